"""What a file prefers: the section of an audit's page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.report.drawing import drawing
from jaxpref.report.html import Browse, Figure, Table
from jaxpref.report.style import FAINT, PALETTE

Record = Mapping[str, Any]

EVERYONE = "all labels"
"""The scope of all labels."""
DRAWN = 15
"""Number of features in the figure."""
CLEAR = 0.05
"""Largest share of false discoveries among the features that are named."""
COLUMNS = (
    *("feature", "of", "weight", "95% interval", "beside all others"),
    *("preferred has more", "labels", "q"),
)


def preference_parts(
    records: Sequence[Record], path: Path, *, confounders: Sequence[str]
) -> list:
    """The parts of the section.

    Args:
      records: see `jaxpref.evaluate.preferences`.
      path: where to draw the figure.
      confounders: what was held fixed.
    """
    everyone = [r for r in records if r["by"] == EVERYONE and r["weight"] is not None]
    if not everyone:
        return ["There are too few labels to say."]
    own = {r["feature"]: r for r in records if r["by"] == "model"}
    strongest = sorted(everyone, key=_strength, reverse=True)[:DRAWN]
    _draw(path, strongest, own)
    return [
        _in_words(everyone),
        _HOW,
        *([f"Held fixed: {', '.join(confounders)}."] if confounders else []),
        Figure(
            path,
            f"Weights with 95% intervals of the {len(strongest)} features that differ "
            "most clearly: of the labels, and of the model's own ranking by log-prob "
            "per token. Above 0, answers with more of the feature are preferred.",
        ),
        Browse(
            Table(COLUMNS, [_row(record) for record in records], _CAPTION),
            [_scope(record) for record in records],
            "Labels of",
            EVERYONE,
        ),
    ]


_HOW = """A weight is the log-odds of being preferred per unit of the feature, where the
unit is its typical difference between two answers of this file (root mean square). It
describes the labels and need not be their cause: longer answers may have more lists.
The weights "beside all others" hold every other feature of the table fixed. With
`--confounders length,annotator`, the other weights hold length and annotator fixed."""
_CAPTION = """Bradley-Terry weights; the intervals allow for several labels on one
prompt. `q` is the false discovery rate among the features whose `q` is at most as
large. `preferences.csv` has all numbers."""


def _in_words(everyone: Sequence[Record]) -> str:
    """The clearest preferences, in a sentence."""
    clear = sorted(
        (record for record in everyone if record["q"] < CLEAR),
        key=_strength,
        reverse=True,
    )
    if not clear:
        return "No feature of the table is clearly preferred or avoided."
    more = [r["meaning"] for r in clear if r["weight"] > 0][:5]
    fewer = [r["meaning"] for r in clear if r["weight"] < 0][:5]
    said = [f"The labels prefer answers with more: {'; '.join(more)}."] if more else []
    said += [f"They prefer answers with fewer: {'; '.join(fewer)}."] if fewer else []
    return " ".join(said)


def _strength(record: Record) -> float:
    """The weight in standard deviations."""
    width = record["high"] - record["low"]
    return abs(record["weight"]) / width if width else 0.0


def _scope(record: Record) -> str:
    return f"{record['by']}: {record['name']}" if record["name"] else record["by"]


def _row(record: Record) -> list[object]:
    number = lambda name, form="{:+.2f}": (
        None if record[name] is None else form.format(record[name]).replace("-", "−")
    )
    interval = None
    if record["low"] is not None:
        interval = f"{number('low')} to {number('high')}"
    return [
        record["meaning"],
        _scope(record),
        number("weight"),
        interval,
        number("joint"),
        None if record["more"] is None else f"{100 * record['more']:.0f}%",
        record["labels"],
        number("q", "{:.3f}"),
    ]


def _draw(path: Path, records: Sequence[Record], own: Mapping[str, Record]) -> None:
    with drawing(path, size=(6.6, 1.0 + 0.3 * len(records))) as figure:
        axes = figure.add_subplot()
        kinds = (("labels", list(records), -0.12, 0), ("model", [], 0.12, 3))
        kinds[1][1].extend(own.get(record["feature"], {}) for record in records)
        for name, drawn, shift, color in kinds:
            known = [
                (n + shift, r)
                for n, r in enumerate(drawn)
                if r and r["weight"] is not None
            ]
            if not known:
                continue
            axes.errorbar(
                [r["weight"] for _, r in known],
                [y for y, _ in known],
                xerr=[
                    [r["weight"] - r["low"] for _, r in known],
                    [r["high"] - r["weight"] for _, r in known],
                ],
                color=PALETTE[color], fmt="o", ms=4, lw=1.2, label=name,
            )  # fmt: skip
        axes.axvline(0, color=FAINT, lw=0.8)
        axes.set_yticks(range(len(records)), [r["meaning"] for r in records])
        axes.set_ylim(len(records) - 0.4, -0.6)
        axes.set(xlabel="weight (log-odds per typical difference)")
        axes.legend(loc="best", fontsize=9)
        axes.grid(axis="y", visible=False)
