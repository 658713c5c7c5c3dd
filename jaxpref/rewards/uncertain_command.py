"""The options of `jaxpref score --uncertainty`, and what they compute."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.rewards import uncertainty
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.combined import Rewards
from jaxpref.rewards.models import ModelReward
from jaxpref.rewards.options import RewardOptions
from jaxpref.rewards.reward import Reward
from jaxpref.rewards.uncertainty import Predict, Uncertain
from jaxpref.runtime import processes
from jaxpref.runtime.ranges import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class UncertaintyOptions:
    """How the uncertainty of rewards is estimated."""

    uncertainty: Literal["dropout", "ensemble", "laplace"] | None = None
    """Also write the standard deviations of rewards (score_std) and, of pairs, of the
    margin (margin_std), and the probability that the chosen answer is better
    (p_chosen): by dropout on the features that the head reads; of several reward models
    or of heads that are fitted to resampled pairs; or by the head's posterior."""
    fit_data: str | None = None
    """Pairs that the reward model was trained on: for laplace, and for ensemble with
    one reward model."""
    calibration_data: str | None = None
    """Held-out pairs, to whose labels the temperature of p_chosen is fitted."""
    passes: int = 10
    """Dropout masks, or heads that are fitted."""
    dropout_rate: float = 0.1
    """Probability of dropping a feature."""
    seed: int = 0
    """Seed of dropout masks and resampled pairs."""

    @property
    def reads(self) -> dict[str, str | None]:
        """The files that are read, by option."""
        return {
            "--fit-data": self.fit_data,
            "--calibration-data": self.calibration_data,
        }

    def check(self, rewards: RewardOptions) -> None:
        """Refuses options that the estimator does not read, and missing ones."""
        how, several = self.uncertainty, len(rewards.reward) > 1
        fits = how == "laplace" or (how == "ensemble" and not several)
        draws = how == "dropout" or (how == "ensemble" and not several)
        reads = {
            "fit_data": fits,
            "calibration_data": how is not None,
            "passes": draws,
            "dropout_rate": how == "dropout",
            "seed": draws,
        }
        given = f"--uncertainty {how}" + " of several rewards" * several
        reason = f"{given} does not read it" if how else "only --uncertainty reads it"
        for name, is_read in reads.items():
            if not is_read and getattr(self, name) != getattr(DEFAULT, name):
                raise InputError(f"--{name.replace('_', '-')}: {reason}")
        if how is None:
            return
        if several and how != "ensemble":
            raise InputError(f"--uncertainty {how}: name one reward model")
        weighted = rewards.weights or rewards.weights_field is not None
        if rewards.combine != "sum" or weighted:
            raise InputError(
                f"--uncertainty {how}: the reward is the mean of all; leave out "
                "--combine, --weights and --weights-field"
            )
        if fits and self.fit_data is None:
            raise InputError(
                f"--uncertainty {how}: name the pairs that the model was trained on "
                "with --fit-data"
                + (", or several rewards" if how == "ensemble" else "")
            )
        at_least(1 if how == "dropout" else 2, self, "passes")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"--dropout-rate {self.dropout_rate}: must be in [0, 1)")


DEFAULT = UncertaintyOptions()


def uncertain_rewards(
    options: UncertaintyOptions,
    rewards: Mapping[str, Reward],
    answered: Sequence[Answered],
    read: Callable[[str], Sequence[Answered]],
) -> tuple[list[Uncertain], dict[str, Rewards]]:
    """The rewards with their uncertainty, and each reward alone.

    Args:
      options: how it is estimated; not None.
      rewards: the rewards, by the word that names them.
      answered: the prompts and their answers.
      read: reads a further file of such records.

    Raises:
      InputError: if a reward is no reward model, or a file cannot be used.
    """
    if len(rewards) > 1:
        models = rewards.values()
        predict = lambda some: uncertainty.of_models([model(some) for model in models])
        parts = {word: reward(answered) for word, reward in rewards.items()}
        found = uncertainty.of_models([*parts.values()])
    else:
        ((word, reward),) = rewards.items()
        fit_data = [] if options.fit_data is None else read(options.fit_data)
        predict = estimator(options, reward, fit_data)
        found = predict(answered)
        parts = {word: [x.rewards for x in found]}
    if options.calibration_data is not None:
        pairs = read(options.calibration_data)
        temperature = uncertainty.temperature_of(predict, pairs, "--calibration-data")
        processes.log(f"temperature of p_chosen: {temperature:.4g}")
        found = uncertainty.calibrated(found, temperature)
    return found, parts


def estimator(
    options: UncertaintyOptions, reward: Reward, fit_data: Sequence[Answered]
) -> Predict:
    """What estimates the uncertainty of one reward model.

    Args:
      options: how; not None.
      reward: the reward model.
      fit_data: the pairs that it was trained on; not read by dropout.

    Raises:
      InputError: if the reward is no reward model.
    """
    if not isinstance(reward, ModelReward) or reward.attribute is not None:
        raise InputError(f"--uncertainty {options.uncertainty}: needs a reward model")
    head, passes, seed = uncertainty.load_head(reward), options.passes, options.seed
    match options.uncertainty:
        case "dropout":
            rate = options.dropout_rate
            return uncertainty.by_dropout(head, rate=rate, passes=passes, seed=seed)
        case "ensemble":
            return uncertainty.by_resampling(head, fit_data, passes=passes, seed=seed)
        case _:
            return uncertainty.by_laplace(head, fit_data)
