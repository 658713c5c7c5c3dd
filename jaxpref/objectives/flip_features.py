"""What flip rates may depend on, read from a batch."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.noise.instance import Features
from jaxpref.objectives.inputs import Inputs

READS = {
    "length": ("chosen_lengths", "rejected_lengths"),
    "likelihood": (
        "reference_chosen_logps",
        "reference_rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
    ),
    "position": ("chosen_first",),
    "predictor": ("flip_predictor",),
}
"""What each feature is computed from."""
EVEN = ("predictor",)
"""Features that stay the same if the answers change places."""


@dataclasses.dataclass(frozen=True)
class FlipFeatures:
    """The features in use, and the prior standard deviations of their coefficients."""

    even: Mapping[str, float]
    odd: Mapping[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, even ones first, as coefficients are."""
        return (*self.even, *self.odd)

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays that the features are computed from."""
        return tuple(dict.fromkeys(x for name in self.names for x in READS[name]))

    def read(self, inputs: Inputs) -> Features:
        """The features of the pairs as labeled; no gradients."""
        return Features(_stacked(inputs, self.even), _stacked(inputs, self.odd))


def flip_features(spreads: Mapping[str, float]) -> FlipFeatures:
    """The features whose prior standard deviation is not 0."""
    used = {name: x for name, x in spreads.items() if x}
    return FlipFeatures(
        even={name: x for name, x in used.items() if name in EVEN},
        odd={name: x for name, x in used.items() if name not in EVEN},
    )


def _stacked(inputs: Inputs, names) -> Float[Array, "*batch S features"]:
    columns = [_feature(inputs, name) for name in names]
    if not columns:  # sharded as the pairs are
        return inputs.annotators[..., None][..., :0].astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.stack(columns, axis=-1))


def _feature(inputs: Inputs, name: str) -> Float[Array, "*batch S"]:
    values = inputs.arrays(READS[name])
    if name == "length":
        chosen, rejected = values
        return jnp.tanh(2 * (jnp.log(chosen) - jnp.log(rejected)))
    if name == "likelihood":
        chosen, rejected, chosen_length, rejected_length = values
        return jnp.tanh(chosen / chosen_length - rejected / rejected_length)
    if name == "position":
        return 2 * values[0] - 1
    return values[0]
