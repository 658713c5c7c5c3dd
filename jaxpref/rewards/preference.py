"""Rewards from a general preference model, which scores pairs of answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.losses import skew_symmetric_score
from jaxpref.models.weights import Weights, head_of
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.models import ModelOptions, in_memory, score


@dataclasses.dataclass(frozen=True)
class PreferenceReward:
    """The mean score of an answer over all K answers to its prompt, in log-odds.

        r(y_i) = 1/K sum over j of s(y_i > y_j | x) / tau

    The answer itself is one of them, with score 0.  The reward of one of two answers
    minus that of the other is thus the score of the pair; of more answers, r(y_i) minus
    the mean of the others is the mean score over the others.  Cyclic preferences
    (Zhang et al. 2024, arXiv:2410.02197) give equal rewards.
    """

    name: str
    """As the user wrote it."""
    weights: Weights
    options: ModelOptions
    params: Any = None
    """The model's parameters; None to load them in each call."""

    def loaded(self) -> "PreferenceReward":
        """The same reward with the model in memory, for many calls."""
        params, options = in_memory(self.weights, self.options)
        return dataclasses.replace(self, params=params, options=options)

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`.

        Raises:
          InputError: if a prompt has one answer only.
        """
        for one in answered:
            if len(one.texts) == 1:
                raise InputError(
                    f"{one.place}: has one answer, but --reward {self.name} compares "
                    "answers; give at least two"
                )
        asked = answered, self.options, self.name
        found = score(self.weights, "embeddings", *asked, params=self.params)
        temperature = head_of(self.weights).temperature
        return [mean_scores(own) / temperature for own in found]


def mean_scores(embeddings: Float[np.ndarray, "K n"]) -> Float[np.ndarray, " K"]:
    """The mean of s(y_i > y_j | x) over all answers j; NaN for those without one.

    Args:
      embeddings: of the answers to a prompt; NaN for an answer without one.
    """
    known = np.isfinite(embeddings).all(1)
    found = np.full(len(embeddings), np.nan)
    if known.any():
        own = embeddings[known]
        sides = np.broadcast_arrays(own[:, None], own[None])
        scores = skew_symmetric_score(*map(jnp.asarray, sides))
        found[known] = np.asarray(scores).mean(1)
    return found
