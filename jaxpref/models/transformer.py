"""Flax NNX modules shared by all families.

Axes: B rows, T tokens, D hidden, H query heads, G key-value heads, K head features,
V vocabulary, L layers, N row groups (see `gathering`).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpref.models.architecture import Architecture
from jaxpref.models.gathering import (
    all_gather_per_row_group,
    embedding_lookup,
    num_row_groups,
    transpose_table,
)
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.models.numerics import Numerics
from jaxpref.models.soft_prompt import Prompted

Rngs = nnx.Rngs

Attend = Callable[..., tuple[jax.Array, Any]]
"""Attention in a block: `attend(q, k, v, sliding=True)`.

It maps queries [B, T, H, K] and keys and values [B, T, G, K] to the result
[B, T, H, K] and the state that the block returns: the cache in decoding, nothing in
training.  Scores are scaled by 1/sqrt(K).  `sliding` says whether the architecture's
sliding window applies; it may be a value of `Transformer.layer_attributes`.
"""


def rms_norm(
    x: Float[Array, "*axes D"],
    gain: Float[Array, "*features D"],
    eps: float,
) -> Float[Array, "*axes D"]:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * gain, the quotient in float32 or wider.

    The mean is over the axes of the gain, which are the last ones of x.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    features = tuple(range(-gain.ndim, 0))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, features, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * gain.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*axes D"],
    gain: Float[Array, "*heads D"],
    bias: Float[Array, "*heads D"],
    eps: float,
) -> Float[Array, "*axes D"]:
    """LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * gain + bias, in float32 or wider.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    gain, bias = gain.astype(wide.dtype), bias.astype(wide.dtype)
    return (wide * scale * gain + bias).astype(x.dtype)


def add_bias(x: Float[Array, "*axes D"], bias: nnx.Param) -> Float[Array, "*axes D"]:
    """X + bias, in the dtype of x."""
    return x + bias[...].astype(x.dtype)


def normal(
    rngs: Rngs,
    architecture: Architecture,
    numerics: Numerics,
    shape: Sequence[int],
    spec: PartitionSpec,
    scale: float = 1.0,
) -> nnx.Param:
    """A parameter with standard deviation `scale` times `initializer_range`.

    It is created sharded: no device ever holds all of it.
    """
    key, dtype = rngs.params(), jnp.dtype(numerics.param_dtype)
    draw = jax.random.normal(key, shape, dtype, out_sharding=on_mesh(spec))
    return nnx.Param(draw * jnp.asarray(scale * architecture.initializer_range, dtype))


def ones(numerics: Numerics, shape: Sequence[int], spec: PartitionSpec) -> nnx.Param:
    """A parameter of ones, such as the gain of a norm."""
    return nnx.Param(reshard(jnp.ones(shape, jnp.dtype(numerics.param_dtype)), spec))


def zeros(numerics: Numerics, shape: Sequence[int], spec: PartitionSpec) -> nnx.Param:
    """A parameter of zeros, such as a bias."""
    return nnx.Param(reshard(jnp.zeros(shape, jnp.dtype(numerics.param_dtype)), spec))


class Block(nnx.Module):
    """The layers of a family.

    It is created with the weights of all layers, each array [L, ...], and called with
    those of one layer: `functional` slices them within its scan over the layers.
    """

    def __init__(self, architecture: Any, numerics: Numerics, rngs: Rngs):
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer.

        Args:
            x: the residual stream.
            shared: what `Transformer.shared_inputs` returned, the same in all layers.
            attributes: the layer's slice of `Transformer.layer_attributes`.
            attend: attention, called once.

        Returns:
            The new residual stream, and the state that `attend` returned.
        """
        raise NotImplementedError


class Transformer(nnx.Module):
    """Embedding, stacked layers and, if it is not tied, the LM head.

    A family's subclass names the block and adds the final norm.
    """

    block: ClassVar[type[Block]]

    def __init__(self, architecture: Any, numerics: Numerics, rngs: Rngs):
        V, D = architecture.vocab_size, architecture.hidden_size
        self.architecture, self.numerics = architecture, numerics
        self.embed = normal(rngs, architecture, numerics, (V, D), SPECS.embed)
        self.layers = self.block(architecture, numerics, rngs)
        if not architecture.tie_word_embeddings:
            self.head = normal(rngs, architecture, numerics, (D, V), SPECS.head)

    def shared_inputs(self, positions: Int[Array, "B T"]) -> Any:
        """What all layers need to know about positions, such as rotary angles."""
        raise NotImplementedError

    def layer_attributes(self) -> Any:
        """Constants that differ by layer: a pytree of arrays [L, ...], or None."""
        return None

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The LM head's input, from the last layer's residual stream."""
        raise NotImplementedError

    def embed_tokens(
        self,
        table: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """The first residual stream, in the compute dtype.

        A family that scales embeddings or adds learned positions overrides this, and
        leaves the table to it, which may be a `Prompted`.
        """
        if isinstance(table, Prompted):
            x = Transformer.embed_tokens(self, table.table, tokens, positions)
            return table.replaced(x, positions)
        dtype = self.numerics.compute_dtype
        if table.ndim > 2:
            return reshard(embedding_lookup(table, tokens, dtype), SPECS.hidden)
        # The explicit all-gather of FSDP.
        table = reshard(table.astype(dtype), SPECS.embed_gathered)
        tokens = reshard(tokens, SPECS.tokens)
        x = table.at[tokens].get(out_sharding=on_mesh(SPECS.features))
        return reshard(x, SPECS.hidden)

    def table(self) -> Float[Array, "*N V D"]:
        """The embedding: one copy per row group, or [V, D] if there is one group."""
        if num_row_groups() == 1:
            return self.embed[...]
        return all_gather_per_row_group(self.embed[...], self.numerics.compute_dtype)

    def heads(self, table: Float[Array, "*N V D"]) -> Float[Array, "*N D V"]:
        """The LM head, one copy per row group; see `table`.

        [D, V] if there is one group; else XLA on CPU would transpose it in each chunk.
        """
        if num_row_groups() == 1:
            return self.head_weight()
        dtype = self.numerics.compute_dtype
        if self.architecture.tie_word_embeddings:
            return transpose_table(table, dtype)
        return all_gather_per_row_group(self.head[...], dtype)

    def head_weight(self) -> Float[Array, "D V"]:
        """The LM head, replicated over fsdp, its vocabulary sharded over tensor."""
        tied = self.architecture.tie_word_embeddings
        head = self.embed[...].T if tied else self.head[...]
        return reshard(head, SPECS.head_gathered)
