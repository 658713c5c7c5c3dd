"""The score of every record, and which records are kept."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of the N records of a file."""

    values: Float[np.ndarray, " N"]
    """NaN for records without a score."""
    reasons: Sequence[str]
    """Why each record has no score or is left out anyway; empty if it may be kept."""
    others: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Further columns of the file of scores, by name; None or NaN if missing."""


def by_row(
    rows: Sequence[int],
    columns: Mapping[str, Sequence[float] | np.ndarray],
    reasons: Mapping[int, str],
    count: int,
) -> Scores:
    """The scores of records, each the mean over its pairs.

    Args:
      rows: the record of each pair, from 0.
      columns: the numbers of the pairs by name; the first is the score.
      reasons: by row, why a record or one of its pairs has no score.
      count: N, the number of records.
    """
    place = np.asarray(rows, np.int64)
    pairs = np.bincount(place, minlength=count)
    means = {}
    for name, values in columns.items():
        sums = np.bincount(place, np.asarray(values, np.float64), minlength=count)
        means[name] = np.where(pairs > 0, sums / np.maximum(pairs, 1), np.nan)
    score, *others = means
    said = ["" if pairs[n] else reasons.get(n, "no pair") for n in range(count)]
    return Scores(means[score], said, {name: means[name] for name in others})


def choose(
    scores: Scores,
    *,
    keeps: str,
    keep: int | float | None,
    low: float | None,
    high: float | None,
    seed: int,
) -> tuple[Bool[np.ndarray, " N"], list[str]]:
    """Which records are kept, and why each of the others is left out.

    Args:
      scores: the scores of N records.
      keeps: whether `keep` keeps the "highest" or the "lowest" scores; "" keeps all
        records without a reason.
      keep: how many: a number, or a share (float) of the records with a score that is
        within the bounds, rounded, at least 1; None for all.
      low: lowest score to keep; None for no bound.
      high: highest score to keep; None for no bound.
      seed: decides between equal scores.

    Raises:
      InputError: if no record is left, or `keep` is more than there are.
    """
    values, reasons = scores.values, list(scores.reasons)
    usable = np.array([not reason for reason in reasons])
    if not keeps:
        return usable, reasons
    below = usable & (values < (-np.inf if low is None else low))
    above = usable & (values > (np.inf if high is None else high))
    for found, reason in ((below, "score below --min"), (above, "score above --max")):
        for n in np.flatnonzero(found):
            reasons[n] = reason
    rows = np.flatnonzero(usable & ~below & ~above)
    if not len(rows):
        counts = collections.Counter(reasons).most_common()
        why = ", ".join(f"{reason} {count:,}" for reason, count in counts)
        raise InputError(f"no record is left ({why}); change what is kept")
    if isinstance(keep, int) and keep > len(rows):
        raise InputError(
            f"--keep {keep}: only {len(rows):,} records have a score within the bounds"
        )
    if isinstance(keep, float):
        keep = max(round(keep * len(rows)), 1)
    count = len(rows) if keep is None else keep
    # A permutation first: a stable sort then leaves equal scores in its order.
    rows = np.random.default_rng(seed).permutation(rows)
    sign = 1 if keeps == "lowest" else -1
    rows = rows[np.argsort(sign * values[rows], kind="stable")]
    for n in rows[count:]:
        reasons[n] = f"score not among the {keeps} of --keep"
    kept = np.zeros(len(values), bool)
    kept[rows[:count]] = True
    return kept, reasons
