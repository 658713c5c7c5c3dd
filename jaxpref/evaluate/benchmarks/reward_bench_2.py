"""RewardBench 2 (Malik et al. 2025, arXiv:2506.01937)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

TIES = "Ties"
SUBSETS = {"Factuality", "Precise IF", "Math", "Safety", "Focus", TIES}


def matches(fields: Mapping[str, Any]) -> bool:
    """Whether a record has one of the subsets, and how many answers are right."""
    subset = fields.get("subset")
    known = isinstance(subset, str) and subset in SUBSETS
    return known and "num_correct" in fields


def score(
    rewards: Float[np.ndarray, "lists answers"],
    exists: Bool[np.ndarray, "lists answers"],
    fields: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """The score of each subset, and their mean.

    A prompt with one right answer of four counts if that answer has the highest reward,
    and 1/n if it shares it with others, n answers in all.  Ties are scored by `ties`.

    Args:
      rewards: right answers first; [lists, answers].
      exists: which answers are there; [lists, answers].
      fields: with `subset`, `num_correct` and, for Ties, `id`.

    References:
      allenai/reward-bench, rewardbench/utils.py.
    """
    names = np.array([x["subset"] for x in fields])
    masked = np.where(exists, rewards, -np.inf)
    top = masked == masked.max(axis=1, keepdims=True)
    points = np.where(top[:, 0], 1 / top.sum(axis=1), 0)
    found = {
        str(x): float(points[names == x].mean()) for x in np.unique(names) if x != TIES
    }
    if TIES in names:
        own = np.flatnonzero(names == TIES).tolist()
        found[TIES] = ties(
            rewards[own],
            exists[own],
            [int(fields[n]["num_correct"]) for n in own],
            [str(fields[n]["id"]) for n in own],
        )
    return found | {"overall": float(np.mean([*found.values()]))}


def ties(
    rewards: Float[np.ndarray, "lists answers"],
    exists: Bool[np.ndarray, "lists answers"],
    num_correct: Sequence[int],
    ids: Sequence[str],
) -> float:
    """The weighted score of prompts with many right answers.

        0.3 a_t + 0.3 a_r + 0.2 mean(m_t > s) + 0.2 mean(min(m_r, m_t) > s)
          + 0.01 mean(tanh(min(m_r, m_t) / s - 1))

    a is the share of prompts whose right answers all have higher rewards than all wrong
    ones, m the margin between the worst right and the best wrong answer, and s the
    spread of the right answers.  The indices are of tied prompts, which have several
    right answers, and of their references, which have one.  The means are over prompts
    that have both.  Quotients 0 / 0 count 0.

    Args:
      rewards: right answers first; [lists, answers].
      exists: which answers are there; [lists, answers].
      num_correct: the number of right answers.
      ids: `tied:7` or `ref:7`, with the number of the prompt.
    """
    margins: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for own, there, count, name in zip(rewards, exists, num_correct, ids, strict=True):
        kind, _, prompt = name.partition(":")
        right, wrong = own[:count], own[count:][there[count:]]
        spread = float(right.max() - right.min())
        margins[kind][prompt] = float(right.min() - wrong.max()), spread
    accurate = {
        kind: float(np.mean([m > 0 for m, _ in one.values()])) if one else 0.0
        for kind, one in margins.items()
    }
    both = sorted(margins["ref"].keys() & margins["tied"].keys())
    total = 0.3 * accurate["tied"] + 0.3 * accurate["ref"]
    if not both:
        return total
    of_tied = np.array([margins["tied"][x] for x in both])
    margin, spread = of_tied.T
    least = np.minimum(margin, [margins["ref"][x][0] for x in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    total += 0.2 * np.mean(margin > spread) + 0.2 * np.mean(least > spread)
    return float(total + 0.01 * gaps.mean())
