"""The model as pure functions of its parameters; the one file that splits NNX."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpref.models.attention import attention
from jaxpref.models.config import SPECS, ModelConfig, check_mesh, on_mesh, place
from jaxpref.models.linear import PRODUCT
from jaxpref.models.logprobs import project
from jaxpref.models.transformer import Block, Transformer, rotary_angles

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for one batch of sequences."""

    keys: jax.Array
    """[L, B, S, G, K] in the compute dtype, rotated."""
    values: jax.Array
    """[L, B, S, G, K] in the compute dtype."""
    start: jax.Array
    """int32 [B]; the slot of each row's first real token, left padding before it."""
    filled: jax.Array
    """int32 []; slots written so far, the same in every row."""


@functools.cache
def _graphs(config: ModelConfig):
    # The structures without arrays.  Layouts are in the arrays' types, not in here: one
    # structure serves every mesh.
    module = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return nnx.split(module)[0], nnx.split(module.layers)[0]


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    saved = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    # Within a scan nothing can be merged across the barrier anyway.
    return jax.checkpoint(
        layer, policy=saved if policy == "dots" else None, prevent_cse=False
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer: a config and pure functions of its parameters.

    Parameters are a nested dict: `embed` [V, D], `layers` (each leaf [L, ...]), `norm`
    [D] and, unless tied, `head` [D, V].  The functions work without a mesh and under an
    Explicit mesh with axes `data`, `fsdp`, `tensor` set by `jax.set_mesh`; there B must
    be a multiple of data * fsdp.  A model is hashable: a static argument of `jax.jit`.
    """

    config: ModelConfig

    def _transformer(self, params: Params) -> Transformer:
        return nnx.merge(_graphs(self.config)[0], params)

    def _layer(self, weights) -> Block:
        return nnx.merge(_graphs(self.config)[1], weights)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, in their layout on the mesh that is set.

        Matrices are normal with `initializer_range`, those that write to the residual
        stream smaller by sqrt(2 L); gains are one.  `jax.eval_shape(model.init, key)`
        gives shapes and layouts without any memory.

        Raises:
            InputError: the mesh's axes are not Explicit `data`, `fsdp` and `tensor`, or
                they do not divide the model's sizes.
        """
        check_mesh(self.config)
        module = Transformer(self.config, nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def hidden(
        self, params: Params, tokens, positions=None, segments=None
    ) -> jax.Array:
        """Final hidden states [B, T, D] of tokens [B, T], in the compute dtype.

        Args:
            params: parameters.
            tokens: int [B, T].
            positions: int [B, T], by default 0, 1, 2, ... in every row.
            segments: `(pairs, parts)` of packed rows, each int [B, T]; see
                `packed_attention`.  By default every token sees all before it, which is
                all that rows padded on the right need.
        """
        transformer = self._transformer(params)
        return self._hidden(
            transformer, transformer.table(), params, tokens, positions, segments
        )

    def hidden_and_heads(
        self, params: Params, tokens, positions=None, segments=None
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and the LM head that `token_logps` is to multiply it by.

        The head [N, D, V] has a copy for each of the N groups of rows of the mesh, or
        is [D, V] where there is one: what training takes in place of `head`, as its
        slope is summed over devices but once, if tied together with the embedding's.
        """
        transformer = self._transformer(params)
        table = transformer.table()
        hidden = self._hidden(transformer, table, params, tokens, positions, segments)
        return hidden, transformer.heads(table)

    def _hidden(self, transformer, table, params, tokens, positions, segments):
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        else:
            positions = place(positions, SPECS.tokens)
        if segments is not None:
            segments = tuple(place(x, SPECS.tokens) for x in segments)
        angles = rotary_angles(self.config, positions)

        def layer(x, weights):
            return self._layer(weights)(x, angles, segments), None

        layer = _remat(layer, self.config.remat)
        x = transformer.embed_tokens(table, tokens)
        unroll = min(self.config.unroll, self.config.num_layers)
        x, _ = jax.lax.scan(layer, x, params["layers"], unroll=unroll)
        return transformer.final_norm(x)

    def head(self, params: Params) -> jax.Array:
        """The LM head [D, V] in the parameter dtype (if tied, the embedding turned)."""
        return self._transformer(params).head_weight()

    def logits(self, params: Params, tokens) -> jax.Array:
        """Logits [B, T, V] in float32 or wider; for tests, never for training."""
        return project(self.hidden(params, tokens), self.head(params))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens."""
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        zeros = lambda: jnp.zeros(
            shape, c.compute_dtype, out_sharding=on_mesh(SPECS.cache)
        )
        start = place(jnp.zeros(batch, jnp.int32), SPECS.rows)
        return Cache(zeros(), zeros(), start, jnp.zeros((), jnp.int32))

    def prefill(self, params: Params, tokens, lengths, cache: Cache):
        """Hidden states [B, T, D] of prompts padded on the left, and the filled cache.

        Args:
            params: parameters.
            tokens: int [B, T], row b's prompt in its last `lengths[b]` places.
            lengths: int [B].
            cache: an empty cache of length >= T.

        Raises:
            ValueError: the prompts are longer than the cache.
        """
        start = place(tokens.shape[1] - lengths, SPECS.rows)
        cache = dataclasses.replace(cache, start=start.astype(jnp.int32))
        return self.decode(params, tokens, cache)

    def decode(self, params: Params, tokens, cache: Cache):
        """Hidden states [B, T, D] of the next T tokens [B, T], and the grown cache.

        The caller keeps within the cache: filled + T <= its length.  `filled` is data,
        so a step too many raises nothing; it overwrites the last slots.

        Raises:
            ValueError: T alone is more than the cache's length.
        """
        if tokens.shape[1] > cache.keys.shape[2]:
            raise ValueError(
                f"Expected at most {cache.keys.shape[2]} tokens, the length of the "
                f"cache, got {tokens.shape[1]}."
            )
        slots = cache.filled + jnp.arange(tokens.shape[1])
        positions = jnp.maximum(slots[None] - cache.start[:, None], 0)
        keys = jnp.arange(cache.keys.shape[2])
        seen = (keys >= cache.start[:, None])[:, None] & (keys <= slots[:, None])
        mask = place(seen[:, None], SPECS.mask)
        transformer = self._transformer(params)
        angles = rotary_angles(self.config, positions)

        # The cache is a carry, not a scanned input: XLA then updates it in place.
        def layer(carry, weights_and_index):
            x, keys, values = carry
            weights, index = weights_and_index
            block = self._layer(weights)
            q, k, v = block.queries_keys_values(x, angles)
            at = (index, 0, cache.filled, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k[None], at)
            values = jax.lax.dynamic_update_slice(values, v[None], at)
            k, v = keys[index], values[index]
            x = block.mix(x, attention(q, k, v, mask))
            return (block.mlp(x), keys, values), None

        x = transformer.embed_tokens(transformer.table(), tokens)
        carry = (x, cache.keys, cache.values)
        layers = (params["layers"], jnp.arange(self.config.num_layers))
        (x, keys, values), _ = jax.lax.scan(layer, carry, layers)
        filled = cache.filled + tokens.shape[1]
        cache = dataclasses.replace(cache, keys=keys, values=values, filled=filled)
        return transformer.final_norm(x), cache


def build(config: ModelConfig) -> Model:
    """The model of a config; it holds no arrays."""
    return Model(config)
