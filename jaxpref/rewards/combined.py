"""Several rewards as one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.choice import reward_of
from jaxpref.rewards.combine import log_sigmoid_centered, lower_bound, weighted_sum
from jaxpref.rewards.constrained import lagrange_multipliers
from jaxpref.rewards.follow_up import FollowUp
from jaxpref.rewards.judge import Judge
from jaxpref.rewards.models import LogRatio, ModelOptions, ModelReward
from jaxpref.rewards.options import RewardOptions
from jaxpref.rewards.preference import PreferenceReward
from jaxpref.rewards.reward import Reward
from jaxpref.rewards.uncertainty import LowerBound
from jaxpref.runtime import processes

OF_MODELS = ModelReward | PreferenceReward | LogRatio | FollowUp
"""Rewards whose models can stay in memory."""
Rewards = list[Float[np.ndarray, " K"]]
"""For each prompt, the reward of each answer."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards of answers, and what they are made of."""

    total: Rewards
    """The combined reward."""
    parts: Mapping[str, Rewards]
    """Each reward, by the word that names it."""
    multipliers: tuple[float, ...] | None = None
    """Those of the rewards after the first, if they are constraints."""


@dataclasses.dataclass(frozen=True)
class Combined:
    """A reward that is made of others."""

    parts: Mapping[str, Reward]
    """The rewards, by the word that names them."""
    options: RewardOptions
    """How they are combined."""

    def in_memory(self) -> "Combined":
        """The same reward with its models loaded, to be computed many times."""
        parts = {
            word: part.loaded() if isinstance(part, OF_MODELS) else part
            for word, part in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def __call__(self, answered: Sequence[Answered]) -> Rewards:
        """See `Reward`."""
        return self.scored(answered).total

    def scored(self, answered: Sequence[Answered]) -> Scored:
        """The reward of each answer, with its parts.

        Raises:
          InputError: if a reward cannot be computed, or no choice of answers reaches
            the thresholds.
        """
        parts = {word: computed(part, answered) for word, part in self.parts.items()}
        found = [*parts.values()]
        multipliers = None
        if self.options.combine == "lower_bound":
            weight = self.options.std_weight
            total = [lower_bound(own, weight) for own in zip(*found, strict=True)]
            return Scored(total, parts)
        if self.options.combine == "log_sigmoid":
            found = [_centered(x, self.options.reference_quantile) for x in found]
        if self.options.combine == "constrained":
            multipliers = self._multipliers(found)
            weights = [(1.0, *multipliers)] * len(answered)
        else:
            weights = [self._weights(one) for one in answered]
        total = [
            weighted_sum(own, w) for own, w in zip(zip(*found, strict=True), weights)
        ]
        return Scored(total, parts, multipliers)

    def _weights(self, answered: Answered) -> Sequence[float]:
        """The weights for a prompt."""
        count, field = len(self.parts), self.options.weights_field
        if field is None:
            return self.options.weights or (1.0,) * count
        value = answered.field(field)
        if (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
        ):
            return value
        raise InputError(
            f"{answered.place}: field '{field}' must hold {count} numbers, the weight "
            f"of each reward, but it is {value!r:.50}"
        )

    def _multipliers(self, found: Sequence[Rewards]) -> tuple[float, ...]:
        """Those of the rewards after the first; answers without a score are left out.

        Raises:
          InputError: if the thresholds cannot be reached.
        """
        known = [np.isfinite(np.stack(own)).all(axis=0) for own in zip(*found)]
        kept = [[x[keep] for x, keep in zip(own, known) if keep.any()] for own in found]
        if not kept[0]:
            raise InputError("--combine constrained: no answer has all rewards")
        options = self.options
        try:
            multipliers = lagrange_multipliers(
                kept[0], kept[1:], options.at_least, beta=options.constraint_beta
            )
        except ValueError:
            best = [np.mean([x.max() for x in own]) for own in kept[1:]]
            raise InputError(
                f"--at-least {' '.join(f'{x:g}' for x in options.at_least)}: no choice "
                "of answers reaches this; the best answers of all prompts have a mean "
                f"of {', '.join(f'{x:.4g}' for x in best)} in each reward alone"
            ) from None
        return tuple(map(float, multipliers))


def combined_reward(options: RewardOptions, models: ModelOptions) -> Combined:
    """The reward that options name.

    Args:
      options: the rewards and their combination.
      models: how models compute rewards.

    Raises:
      InputError: if options are missing or do not fit, or a reward cannot be read.
    """
    options.check()
    parts = {word: reward_of(word, models, options) for word in options.reward}
    return Combined(parts, options)


def computed(reward: Reward, answered: Sequence[Answered]) -> Rewards:
    """The same rewards on all processes, which must call it together.

    They compute those of models together, on the devices of all.  The others are
    computed by process 0 alone: they may be random or slow, run code, or ask a server.
    It calls them in a thread, where `signal.alarm` fails.

    Raises:
      InputError: on all processes, if the reward cannot be computed.
    """
    if jax.process_count() == 1 or isinstance(reward, OF_MODELS | Judge | LowerBound):
        return reward(answered)
    if not answered:
        return []
    counts = [len(one.texts) for one in answered]
    every = lambda: np.concatenate([np.zeros(0), *reward(answered)])
    found = processes.numbers_from_process_zero(every, sum(counts))
    return np.split(found, np.cumsum(counts)[:-1])


def _centered(rewards: Rewards, quantile: float) -> Rewards:
    """Log sigmoid(reward - reference); see `RewardOptions.reference_quantile`."""
    if min(map(len, rewards)) >= 4:
        return [log_sigmoid_centered(x, _quantile(x, quantile)) for x in rewards]
    reference = _quantile(np.concatenate(rewards), quantile)
    return [log_sigmoid_centered(x, reference) for x in rewards]


def _quantile(values: Float[np.ndarray, " n"], quantile: float) -> float:
    """The quantile of the rewards that could be computed; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(np.quantile(known, quantile)) if len(known) else math.nan
