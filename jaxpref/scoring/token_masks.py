"""Masks that weight the reward and the divergence of each token (SparsePO).

A mask is computed from what the reference's layers say of the token that predicts it:
the mean of their activations, or linear heads that are trained with the policy.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Architecture
from jaxpref.models.layout import SPECS, on_mesh

Heads = Mapping[str, Array]
"""The trained parameters of masks; empty if they have none."""
Readouts = Float[Array, "L R Q P n"]
"""What n heads say of each layer, at the positions that predict a target."""
Mask = Float[Array, "R Q P"]


@dataclasses.dataclass(frozen=True)
class ActivationMasks:
    """One mask without parameters: the mean activation, rescaled for each completion.

    See `losses.activation_masks`; the masks of the layers are averaged.
    """

    def readout(self, x: Float[Array, "B T D"], heads: Heads) -> Float[Array, "B T n"]:
        """What is kept of the residual stream after a layer.

        Args:
          x: the residual stream.
          heads: this layer's slice of `layers(heads)`.
        """
        del heads
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.mean(x.astype(wide), axis=-1, keepdims=True)

    def layers(self, heads: Heads) -> Heads:
        """The parameters of single layers, each [L, ...]."""
        del heads
        return {}

    def masks(
        self, readouts: Readouts, heads: Heads, batch: PreferenceBatch
    ) -> tuple[Mask, Mask]:
        """The masks of rewards and of divergences, >= 0."""
        del heads
        _, slots, sides = batch.completion_lengths.shape
        rescale = lambda a: losses.activation_masks(
            a, jnp.asarray(batch.completions), num_completions=slots * sides
        )
        mask = jnp.mean(jax.lax.map(rescale, readouts[..., 0]), axis=0)
        return mask, mask


@dataclasses.dataclass(frozen=True)
class LearnedMasks:
    """Masks of linear heads on every layer, mixed over the layers.

        m_l = ReLU(LN(h_l) w_l + b_l)
        m   = ReLU(sum_l a_l m_l)

    h_l is the reference's residual stream after layer l, and LN subtracts its mean and
    divides by its standard deviation.
    """

    shared: bool = False
    """Whether rewards and divergences have the same mask."""

    def init(self, key: PRNGKeyArray, architecture: Architecture) -> dict[str, Array]:
        """New heads, with which the masks are about 1.

        w_l is normal with variance 1 / D, b_l is 1, and a_l is 1 / L.
        """
        count = 1 if self.shared else 2
        layers, size = architecture.num_layers, architecture.hidden_size
        whole = lambda *shape: on_mesh(P(*(None,) * len(shape)))
        fill = lambda value, *shape: jnp.full(
            shape, value, jnp.float32, out_sharding=whole(*shape)
        )
        shape = (layers, size, count)
        draw = jax.random.normal(key, shape, jnp.float32, out_sharding=whole(*shape))
        return {
            "weight": draw * size**-0.5,
            "bias": fill(1.0, layers, count),
            "mixer": fill(1.0 / layers, layers, count),
        }

    def readout(self, x: Float[Array, "B T D"], heads: Heads) -> Float[Array, "B T n"]:
        """See `ActivationMasks`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centered = wide - jnp.mean(wide, -1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5)
        projected = jnp.einsum(
            "btd,dn->btn",
            centered * scale,
            heads["weight"].astype(wide.dtype),
            out_sharding=on_mesh(SPECS.hidden),
        )
        return jax.nn.relu(projected + heads["bias"].astype(wide.dtype))

    def layers(self, heads: Heads) -> Heads:
        """See `ActivationMasks`."""
        return {name: heads[name] for name in ("weight", "bias")}

    def masks(
        self, readouts: Readouts, heads: Heads, batch: PreferenceBatch
    ) -> tuple[Mask, Mask]:
        """See `ActivationMasks`."""
        del batch
        mixer = heads["mixer"].astype(readouts.dtype)[:, None, None, None]
        mixed = jax.nn.relu(jnp.sum(mixer * readouts, axis=0))
        return mixed[..., 0], mixed[..., -1]
