"""A closer look at each annotator: whom they agree with, and what they prefer."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.evaluate.review import plain_cell

Record = Mapping[str, Any]

LISTED = 50
"""Annotators to look at, the least reliable first."""
PAIRS = 3
"""Their most suspicious pairs that are shown."""
FEATURES = 8
"""Features that are shown, by how clearly the weights differ from everyone's."""
COLUMNS = (
    *("annotator", "votes", "reliability", "low", "high", "suspicious"),
    *("expected_wrong", "common_pairs", "agree", "agree_low", "agree_high"),
)
"""Columns of `annotators.csv`: reliability with its 95% interval, the number of labels
that are more probably wrong than right, the expected number of wrong ones, and how
often others agree on the pairs that they judged too."""


def closer_look(
    annotators: Sequence[Record],
    preferences: Sequence[Record],
    names: Sequence[str | None],
    order: np.ndarray,
) -> list[dict[str, Any]]:
    """What is worth reading about the first `LISTED` annotators.

    Args:
      annotators: the records of `summary.json`, in order.
      preferences: from `preferences.preferences`.
      names: the annotator of each label, [N].
      order: labels, most suspicious first.

    Returns:
      The record of each annotator with a name, with `preferences` (see
      `beside_everyone`) and `labels`: the indices of the most suspicious ones.
    """
    named = [record for record in annotators if record["annotator"] is not None]
    looks = [
        {
            **record,
            "preferences": beside_everyone(preferences, record["annotator"]),
            "labels": [],
        }
        for record in named[:LISTED]
    ]
    of = {look["annotator"]: look["labels"] for look in looks}
    for n in order:
        found = of.get(names[n])
        if found is not None and len(found) < PAIRS:
            found.append(int(n))
    return looks


def beside_everyone(preferences: Sequence[Record], name: str) -> list[dict[str, Any]]:
    """The features whose weight differs most clearly between an annotator and all.

    Returns:
      At most `FEATURES` records: `feature`, `meaning`, the annotator's `weight` with
      its interval `low` to `high`, and the weight of all labels, `everyone`.  They are
      ordered by the difference in units of the interval's width.
    """
    everyone = {
        r["feature"]: r["weight"] for r in preferences if r["by"] == "all labels"
    }
    mine = [
        {key: r[key] for key in ("feature", "meaning", "weight", "low", "high")}
        | {"everyone": everyone[r["feature"]]}
        for r in preferences
        if (r["by"], r["name"]) == ("annotator", name)
        and r["weight"] is not None
        and everyone.get(r["feature"]) is not None
    ]

    def distance(record: Record) -> float:
        width = record["high"] - record["low"]
        return abs(record["weight"] - record["everyone"]) / width if width else 0.0

    return sorted(mine, key=distance, reverse=True)[:FEATURES]


def annotators_csv(annotators: Sequence[Record]) -> bytes:
    """`annotators.csv`: the annotators of `summary.json`, as a spreadsheet."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for record in annotators:
        others = record["others"] or {"items": 0, "agree": "", "interval": ("", "")}
        writer.writerow(
            (
                plain_cell(record["annotator"] or ""),
                record["count"],
                record["reliability"],
                *record["interval"],
                record["suspicious"],
                record["expected_wrong"],
                others["items"],
                others["agree"],
                *others["interval"],
            )
        )
    return file.getvalue().encode("utf-8-sig")
