"""Answers to held-out prompts during training, and their metrics."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.online.answers import Group
from jaxpref.online.batch import dataset_of
from jaxpref.online.token_logps import REFERENCE_LOGPS, TokenLogps, answer_kls
from jaxpref.runtime.processes import log
from jaxpref.scoring.scorer import Params
from jaxpref.train.task import Task


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Prompts that are answered at every evaluation."""

    prompts: Sequence[data.Prompt]
    dataset: data.PreferenceDataset
    """The same, with room for answers."""
    group_size: int
    """Answers to each."""


def heldout_metrics(
    groups: Sequence[Group],
    rewards: Float[np.ndarray, "B K"],
    kls: Float[np.ndarray, "N K"] | None,
) -> dict[str, float]:
    """Means over the answers to held-out prompts.

    `eval_rewards/mean` over those that have a reward, without the penalty of long ones;
    `eval_rewards/missing`, the share of the others; `eval_lengths` in tokens;
    `eval_ended`, the share that ends with a stop token; and `eval_kl` in nats.

    Args:
      groups: the prompts and their answers.
      rewards: of the answers; NaN for none.
      kls: from `reference_kls`; None without a reference.
    """
    answers = [answer for group in groups for answer in group.answers]
    known = rewards[np.isfinite(rewards)]
    found = {
        "eval_rewards/mean": known.mean() if len(known) else np.nan,
        "eval_rewards/missing": 1 - known.size / rewards.size,
        "eval_lengths": np.mean([len(answer.tokens) for answer in answers]),
        "eval_ended": np.mean([answer.ended for answer in answers]),
    }
    if kls is not None:
        found["eval_kl"] = kls.sum() / len(answers)
    return {name: float(value) for name, value in found.items()}


def warn_of_missing(rewards: Float[np.ndarray, "N K"]) -> None:
    """Warns if held-out answers have no reward: their mean leaves them out."""
    if missing := int((~np.isfinite(rewards)).sum()):
        log(
            f"warning: {missing:,} of {rewards.size:,} answers to the held-out prompts "
            "have no reward, such as empty ones, and are left out of "
            "eval_rewards/mean; compare eval_rewards/missing before choosing a step"
        )


def reference_kls(
    task: Task,
    params: Params,
    groups: Sequence[Group],
    prompts: data.PreferenceDataset,
    token_logps: TokenLogps,
) -> Float[np.ndarray, "N K"]:
    """Estimates of KL(policy || reference) of answers; see `answer_kls`.

    Rows are those of training, so the same programs score them: a row holds up to as
    many answers to a prompt as a group has in training, and 0 for those it lacks.

    Args:
      task: what the run computes.
      params: the current parameters.
      groups: the prompts and their answers.
      prompts: all prompts of their file.
      token_logps: from `make_token_logps`.
    """
    most = prompts.num_completions
    parts = [
        Group(group.index, group.answers[first : first + most])
        for group in groups
        for first in range(0, len(group.answers), most)
    ]
    none = np.full((len(parts), most), np.nan, np.float32)

    def step(params: Params, frozen: Any, batch: data.PreferenceBatch):
        del frozen
        _, numbers = token_logps(params, batch)
        kls, pairs = answer_kls(batch, numbers)
        return {REFERENCE_LOGPS: kls}, pairs

    score = task.score(step)
    dataset = dataset_of(parts, none, prompts)
    return score(params, None, dataset, title="held-out prompts")[REFERENCE_LOGPS]
