"""Rewards of answers that are sampled in training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.models.hub import adapter_digest, model_digests
from jaxpref.models.weights import Weights
from jaxpref.rewards import Combined
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.code import CodeTests
from jaxpref.rewards.reward import Reward
from jaxpref.rewards.rules import ReferenceRule


def check_records(reward: Combined, prompts: Sequence[data.Prompt]) -> None:
    """Computes the rewards of no answers, which reads the fields of all records.

    So a record that lacks the right answer, tests or weights is found before a step
    draws it.

    Raises:
      InputError: if one cannot be read.
    """
    readers = ReferenceRule, CodeTests
    parts = {
        word: part if isinstance(part, readers) else _of_nothing
        for word, part in reward.parts.items()
    }
    without_answers = [
        Answered(
            dataclasses.replace(x.example, completions=(), ended=()),
            x.source_record,
            x.place,
        )
        for x in prompts
    ]
    dataclasses.replace(reward, parts=parts)(without_answers)


def _of_nothing(answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
    """A reward, of prompts without answers."""
    return [np.zeros(0)] * len(answered)


@dataclasses.dataclass(frozen=True)
class ZeroOrOne:
    """A reward that must be 0 or 1, to be corrected for a verifier's errors."""

    reward: Reward
    rates: Sequence[str]
    """The options that give the verifier's error rates, for messages."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`.

        Raises:
          InputError: if a reward is another number.
        """
        found = self.reward(answered)
        for one, own in zip(answered, found, strict=True):
            others = own[~(np.isnan(own) | (own == 0) | (own == 1))]
            if len(others):
                raise InputError(
                    f"{one.place}: an answer has the reward {others[0]:g}, but only "
                    "rewards of 0 and 1 can be corrected; leave out "
                    f"{' and '.join(self.rates)}"
                )
        return found


def digests(rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """The digests of the models that rewards read.

    By the word that names the reward, and by the role of the model if that is another
    than `weights`.
    """
    found: dict[str, str] = {}
    for word, reward in rewards.items():
        for role, weights in vars(reward).items():
            if isinstance(weights, Weights):
                name = word if role == "weights" else f"{word} {role}"
                found[name] = model_digests(weights.folder)["weights"]
                if weights.adapter is not None:
                    found[f"{name} adapter"] = adapter_digest(weights.adapter)
    return found
