"""A weight matrix with a low-rank change, in place of the matrix; its norms in DoRA."""

import dataclasses
import string
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt32

from jaxpref.models.gathering import without_fsdp
from jaxpref.models.layout import on_mesh, reshard
from jaxpref.models.quantized import Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Which inputs of an adapter are dropped: a share `rate`, drawn from the key."""

    key: UInt32[Array, "*L words"]
    """The data of a random key; one for each layer."""
    rate: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Zero with probability `rate`, else x / (1 - rate); the mean is x.

        The draws do not depend on the layout.

        Source: Srivastava et al. 2014, JMLR 15; Hu et al. 2021, arXiv:2106.09685,
        appendix D.
        """
        kept = jax.random.bernoulli(
            jax.random.wrap_key_data(self.key),
            1 - self.rate,
            x.shape,
            out_sharding=on_mesh(jax.typeof(x).sharding.spec),
        )
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """W + scale a b, in place of the weight W of one layer or, with an axis L, of all.

    With a magnitude m, each output's weights are then scaled to the norm m (DoRA).
    `linear.dense_einsum` multiplies with it.  Inputs and outputs may be several axes.
    """

    weight: Float[Array, "*L inputs outputs"] | Quantized
    """W, which is frozen."""
    a: Float[Array, "*L inputs r"]
    b: Float[Array, "*L r outputs"]
    scale: float = dataclasses.field(metadata={"static": True})
    magnitude: Float[Array, "*L outputs"] | None = None
    """m, or None for plain LoRA."""
    dropout: Dropout | None = None
    """Of the inputs of a, in training."""

    def __getitem__(self, index: Any) -> "LowRank":
        """Itself: a block reads its weights with `self.query[...]`."""
        if index is not ...:
            raise TypeError(f"a LowRank weight has no part {index}")
        return self


def output_factors(weight: LowRank) -> Float[Array, " outputs"]:
    """The factor of DoRA on each output of one layer: m / ||W + s a b||.

    The norm is over the inputs; it counts as a constant in the gradient.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.
    """
    assert weight.magnitude is not None
    norms, m = jax.lax.stop_gradient(_norms(weight)), weight.magnitude
    # The rows of what they multiply are sharded over fsdp.
    whole = without_fsdp(jax.typeof(m).sharding.spec)
    norms, m = reshard(norms, whole), reshard(m, whole)
    return m / jnp.where(norms > 0, norms, 1)


def output_norms(
    weight: Float[Array, "inputs outputs"] | Quantized, inputs: int
) -> Float[Array, " outputs"]:
    """||W|| of each output of one layer, float32 or wider.

    Args:
        weight: W.
        inputs: the number of axes of its inputs.
    """
    return jnp.sqrt(jnp.sum(jnp.square(_wide(weight)), tuple(range(inputs))))


def _norms(weight: LowRank) -> jax.Array:
    """||W + s a b||, from products of rank r: no array of the size of a b is made."""
    w, s, inputs = _wide(weight.weight), weight.scale, weight.a.ndim - 1
    a, b = weight.a.astype(w.dtype), weight.b.astype(w.dtype)
    i, o = string.ascii_letters[:inputs], string.ascii_letters[inputs : w.ndim]
    whole = jnp.sum(jnp.square(w), tuple(range(inputs)))
    spec = jax.typeof(w).sharding.spec
    a = reshard(a, P(*spec[:inputs], None))
    b = reshard(b, P(None, *spec[inputs:]))
    of_outputs, alone = on_mesh(P(None, *spec[inputs:])), on_mesh(P(None, None))
    along = jnp.einsum(f"{i}{o},{i}y->y{o}", w, a, out_sharding=of_outputs)
    gram = jnp.einsum(f"{i}y,{i}z->yz", a, a, out_sharding=alone)
    of_b = jnp.einsum(f"yz,z{o}->y{o}", gram, b, out_sharding=of_outputs)
    change = jnp.sum(b * (2 * s * along + s * s * of_b), 0)
    return jnp.sqrt(jnp.maximum(whole + change, 0))


def _wide(weight: jax.Array | Quantized) -> jax.Array:
    if isinstance(weight, Quantized):
        return weight.dequantized(jnp.float32)
    return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
