"""The decoder-only transformer, as Flax NNX modules.

Axes: B rows, T tokens, S key slots, D hidden, H query heads, G key-value heads, K head
features, F feed-forward features, V vocabulary, L layers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpref.models.attention import attention, packed_attention
from jaxpref.models.config import (
    SPECS,
    ModelConfig,
    inverse_frequencies,
    on_mesh,
    place,
)
from jaxpref.models.gathering import copies, look_up, row_groups, turned
from jaxpref.models.linear import product


def rms_norm(x, gain, eps):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * gain, the quotient in float32 or wider.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * gain.astype(x.dtype)


def rotary_angles(config: ModelConfig, positions):
    """Cosines and sines [B, T, 1, K/2] of positions [B, T], in float32 or wider."""
    wide = jnp.promote_types(config.compute_dtype, jnp.float32)
    angles = positions[..., None, None].astype(wide) * jnp.asarray(
        inverse_frequencies(config), wide
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """Turns features (i, i + K/2) of x [B, T, H, K] by the position's angles."""
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _normal(rngs, config, shape, spec, scale=1.0):
    # Drawn in its layout: no device ever holds the whole weight.
    key, dtype = rngs.params(), jnp.dtype(config.param_dtype)
    draw = jax.random.normal(key, shape, dtype, out_sharding=on_mesh(spec))
    return nnx.Param(draw * jnp.asarray(scale * config.initializer_range, dtype))


def _ones(config, shape, spec):
    return nnx.Param(place(jnp.ones(shape, jnp.dtype(config.param_dtype)), spec))


class Block(nnx.Module):
    """All layers: attention and a gated MLP, each on a normed residual stream.

    Built with stacked weights [L, ...]; applied with those of one layer, a slice that
    `functional.py` takes within its scan.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, L, D = config, config.num_layers, config.hidden_size
        H, G, K, F = c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
        # Residual writers start smaller, so that depth does not grow the stream.
        small = (2 * L) ** -0.5
        self.config = config
        self.attention_norm = _ones(c, (L, D), SPECS.layer_norm)
        self.query = _normal(rngs, c, (L, D, H, K), SPECS.attention_in)
        self.key = _normal(rngs, c, (L, D, G, K), SPECS.attention_in)
        self.value = _normal(rngs, c, (L, D, G, K), SPECS.attention_in)
        self.output = _normal(rngs, c, (L, H, K, D), SPECS.attention_out, small)
        self.mlp_norm = _ones(c, (L, D), SPECS.layer_norm)
        self.gate = _normal(rngs, c, (L, D, F), SPECS.mlp_in)
        self.up = _normal(rngs, c, (L, D, F), SPECS.mlp_in)
        self.down = _normal(rngs, c, (L, F, D), SPECS.mlp_out, small)

    def queries_keys_values(self, x, angles):
        """Rotated queries [B, T, H, K], rotated keys and values [B, T, G, K]."""
        h = rms_norm(x, self.attention_norm[...], self.config.rms_norm_eps)
        q, k, v = (
            product("btd,dhk->bthk", h, w[...], spec=SPECS.heads)
            for w in (self.query, self.key, self.value)
        )
        return rotate(q, *angles), rotate(k, *angles), v

    def mix(self, x, a):
        """Adds what attention found, [B, T, H, K]."""
        return x + product("bthk,hkd->btd", a, self.output[...], spec=SPECS.hidden)

    def mlp(self, x):
        """Adds down(silu(gate(h)) * up(h)): SwiGLU, Shazeer 2020, arXiv:2002.05202."""
        h = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
        gate = product("btd,df->btf", h, self.gate[...], spec=SPECS.features)
        up = product("btd,df->btf", h, self.up[...], spec=SPECS.features)
        h = jax.nn.silu(gate) * up
        return x + product("btf,fd->btd", h, self.down[...], spec=SPECS.hidden)

    def __call__(self, x, angles, segments=None):
        """One layer: [B, T, D] to [B, T, D]; `(pairs, parts)` of packed rows."""
        q, k, v = self.queries_keys_values(x, angles)
        if segments is None:
            return self.mlp(
                self.mix(x, attention(q, k, v, None, kernels=self.config.kernels))
            )
        return self.mlp(self.mix(x, packed_attention(q, k, v, *segments)))


class Transformer(nnx.Module):
    """Embedding, stacked layers, final norm and, where it is not tied, the LM head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embed = _normal(rngs, config, (V, D), SPECS.embed)
        self.layers = Block(config, rngs)
        self.norm = _ones(config, (D,), SPECS.norm)
        if not config.tie_word_embeddings:
            self.head = _normal(rngs, config, (D, V), SPECS.head)

    def table(self):
        """The embedding: a copy for each group of rows [N, V, D]; [V, D] of one."""
        if row_groups() == 1:
            return self.embed[...]
        return copies(self.embed[...], self.config.compute_dtype)

    def embed_tokens(self, table, tokens):
        """Tokens [B, T] to vectors [B, T, D] in the compute dtype."""
        dtype = self.config.compute_dtype
        if table.ndim > 2:
            return place(look_up(table, tokens, dtype), SPECS.hidden)
        # The FSDP all-gather, written out.
        table = place(table.astype(dtype), SPECS.embed_gathered)
        tokens = place(tokens, SPECS.tokens)
        x = table.at[tokens].get(out_sharding=on_mesh(SPECS.features))
        return place(x, SPECS.hidden)

    def final_norm(self, x):
        """The last norm, [B, T, D] to [B, T, D]."""
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    def heads(self, table):
        """The LM head, one copy for each group of rows [N, D, V]; see `table`.

        [D, V] where there is one group: XLA on CPU would turn a copy in every chunk.
        """
        if row_groups() == 1:
            return self.head_weight()
        dtype = self.config.compute_dtype
        if self.config.tie_word_embeddings:
            return turned(table, dtype)
        return copies(self.head[...], dtype)

    def head_weight(self):
        """The LM head [D, V], whole over fsdp, its vocabulary spread over tensor."""
        tied = self.config.tie_word_embeddings
        head = self.embed[...].T if tied else self.head[...]
        return place(head, SPECS.head_gathered)
