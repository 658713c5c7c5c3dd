"""Which two of several scored answers make a pair."""

from collections.abc import Sequence
from typing import Literal

from jaxpref.data.hashing import hash_uniforms

Rule = Literal["best-worst", "best-random", "all"]
"""The best answer with the worst, the best with a random worse one, or every pair."""


def best_pair(
    scores: Sequence[float], rule: str, *, key: str, min_gap: float = 0.0
) -> tuple[int, int] | None:
    """The best answer and a worse one; None if there is no worse one.

    "best-random" is the recipe of UltraFeedback as used for Zephyr (Tunstall et al.
    2023, arXiv:2310.16944, section 4).

    Args:
      scores: the score of each answer; higher is better.
      rule: "best-worst" or "best-random".
      key: a text that decides which worse answer is drawn.
      min_gap: minimum difference of the scores, >= 0; equal scores never make a pair.
    """
    order = sorted(range(len(scores)), key=lambda n: -scores[n])
    gaps = {n: scores[order[0]] - scores[n] for n in order}
    worse = [n for n, gap in gaps.items() if gap > 0 and gap >= min_gap]
    if not worse:
        return None
    best = order[0]
    if rule == "best-worst":
        return best, worse[-1]
    (u,) = hash_uniforms([key], salt="best-random")
    return best, worse[int(u * len(worse))]
