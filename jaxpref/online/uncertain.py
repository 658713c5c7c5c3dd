"""The lower bound of a single reward model's rewards, by its own uncertainty."""

import dataclasses
from collections.abc import Sequence

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.online.options import UncertainReward
from jaxpref.rewards import Answered, Combined, RewardOptions, read_answered
from jaxpref.rewards.uncertain_command import UncertaintyOptions, estimator
from jaxpref.rewards.uncertainty import LowerBound


def estimation(
    rewards: RewardOptions, uncertain: UncertainReward, *, seed: int
) -> UncertaintyOptions | None:
    """How the uncertainty is estimated; None if it is not.

    Args:
      rewards: the reward, and its combination.
      uncertain: the options.
      seed: of dropout masks and resampled pairs.

    Raises:
      InputError: if options do not fit, or are missing.
    """
    options = UncertaintyOptions(**dataclasses.asdict(uncertain))
    bounds, several = rewards.combine == "lower_bound", len(rewards.reward) > 1
    if uncertain.uncertainty is None:
        options.check(rewards)
        if bounds and not several:
            raise InputError(
                "--combine lower_bound: needs a second --reward, or --uncertainty for "
                "that of one reward model"
            )
        return None
    given = f"--uncertainty {uncertain.uncertainty}"
    if not bounds:
        raise InputError(f"{given}: only --combine lower_bound reads it; give both")
    if several:
        raise InputError(
            f"{given}: --combine lower_bound reads the differences between several "
            "rewards; leave it out, or give one reward model"
        )
    options.check(alone(rewards))
    return dataclasses.replace(options, seed=seed)


def alone(rewards: RewardOptions) -> RewardOptions:
    """The options of the reward itself, without its lower bound."""
    default = RewardOptions.std_weight
    return dataclasses.replace(rewards, combine="sum", std_weight=default)


def read_fit_data(
    options: UncertaintyOptions, records: data.RecordOptions
) -> list[Answered]:
    """The pairs that the reward model was trained on; none if they are not read."""
    if options.fit_data is None:
        return []
    return read_answered(data.open_source(options.fit_data), records)


def lower_bound_of(
    reward: Combined,
    options: UncertaintyOptions,
    weight: float,
    fit_data: Sequence[Answered],
) -> Combined:
    """The reward, with its model replaced by the model's lower bound.

    Args:
      reward: one reward model, in memory.
      options: how its uncertainty is estimated.
      weight: of the standard deviation.
      fit_data: from `read_fit_data`.

    Raises:
      InputError: if it is no reward model, or has another head than a linear one.
    """
    ((word, model),) = reward.parts.items()
    bound = LowerBound(estimator(options, model, fit_data), weight)
    return dataclasses.replace(reward, parts={word: bound})
