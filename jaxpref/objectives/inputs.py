"""What an objective sees of a batch: scores and columns, as losses name them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpref.data.batch import PreferenceBatch
from jaxpref.scoring.scores import score_and_side


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The scores of a batch, and the batch.

    `inputs["policy_chosen_logps"]` is the array [..., S] of that side of each pair;
    `inputs["margin"]` is a column of the records, [..., S], or [..., S, K] for those of
    lists.  Empty slots have log-probability 0 and length 1, so that no loss divides by
    zero there.
    """

    scores: Mapping[str, Any]
    """Name without its side -> [..., R, S, K].  If two models are trained, one such
    mapping per model (see `of`)."""
    batch: PreferenceBatch
    """The whole batch [A, R, ...] or one micro-batch [R, ...]."""

    @property
    def is_pair(self) -> Bool[Array, "*batch S"]:
        """Whether each slot holds a pair."""
        return cast(Array, self.batch.pair_index >= 0)

    @property
    def annotators(self) -> Int[Array, "*batch S"]:
        """Index of each pair's annotator; -1 if unknown."""
        return cast(Array, self.batch.annotator)

    def of(self, model: str) -> "Inputs":
        """The inputs of one of two models that are trained together."""
        return Inputs(self.scores[model], self.batch)

    def constant(self) -> "Inputs":
        """The same inputs with gradients stopped."""
        return Inputs(jax.lax.stop_gradient(self.scores), self.batch)

    def completions(self, name: str) -> Float[Array, "*batch S K"]:
        """A score of all completions, [..., S, K]."""
        if name == "lengths":
            return jnp.maximum(self.batch.completion_lengths, 1).astype(jnp.float32)
        if name in self.scores:
            return self.scores[name]
        return cast(Array, self.batch.reference[name])

    def __contains__(self, name: str) -> bool:
        return name in self.scores or name in self.batch.reference

    def __getitem__(self, name: str) -> Float[Array, "*slots"]:
        if name in self.batch.numbers:
            return cast(Array, self.batch.numbers[name])
        score, side = score_and_side(name)
        if side is None:
            raise KeyError(name)
        # Of vectors, such as embeddings, more axes follow that of the completions.
        slots = (slice(None),) * self.batch.pair_index.ndim
        return self.completions(score)[(*slots, side)]

    def arrays(self, names: tuple[str, ...]) -> list[Float[Array, "*batch S"]]:
        """The arrays that a loss reads, in the loss's order."""
        return [self[name] for name in names]


def mean_over(
    values: Shaped[Array, "*#batch"], where: Bool[Array, "*#batch"]
) -> Float[Array, ""]:
    """Mean of `values` where `where` is true; 0 if it is true nowhere."""
    return jnp.sum(jnp.where(where, values, 0)) / jnp.maximum(jnp.sum(where), 1)
