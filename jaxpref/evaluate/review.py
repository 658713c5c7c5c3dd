"""What an audit does to the file, and the list of pairs for a person to review."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

COLUMNS = (
    *("rank", "row", "suspicion", "margin", "annotator", "action"),
    *("prompt", "chosen", "rejected"),
)
"""Columns of `review.csv`; `suspicion` is the probability that the label is wrong."""
SHORT = 300
"""Characters of a text in `review.csv`."""
DONE = {"drop": "dropped", "relabel": "relabeled", "soft": "given `p_correct`"}
"""What an action did to a pair, by the action."""
# Spreadsheets compute cells that begin with these, and some split cells at a semicolon.
_FORMULA = re.compile(r"(^|;)(\s*[=+\-@\uff0b\uff0d\uff1d\uff20])")


def acted_on(
    posterior: np.ndarray,
    order: np.ndarray,
    *,
    action: str,
    threshold: float,
    top: int | None,
) -> np.ndarray:
    """Which pairs an action applies to, bool [N].

    Args:
      posterior: the probability that each label is right, [N].
      order: the pairs, most suspicious first, [N].
      action: "drop", "relabel", or "soft", which applies to all.
      threshold: the others apply to pairs with a probability below this,
      top: or to this many of the most suspicious pairs, if it is not None.
    """
    if action == "soft":
        return np.ones(len(posterior), bool)
    if top is None:
        return posterior < threshold
    chosen = np.zeros(len(posterior), bool)
    chosen[order[:top]] = True
    return chosen


def rule(action: str, count: int, of: int, *, threshold: float, top: int | None) -> str:
    """By which rule `count` of the pairs were dropped or changed, in a sentence."""
    which = "all of them"
    if action != "soft":
        which = (
            f"those whose label is right with a probability below {threshold:g}"
            if top is None
            else "the most suspicious ones"
        )
    return f"{count} of {of} pairs were {DONE[action]}: {which}"


def advice(summary: Record) -> str | None:
    """What to do if the rule changed few pairs; None if there is nothing to say."""
    acted, expected = summary["acted_on"], summary["expected_wrong"]
    if acted["action"] == "soft" or acted["top"] or acted["pairs"] >= expected / 2:
        return None
    if summary["model"]["interval"][0] <= 0.5:
        return (
            "The model does not agree with the labels more often than chance, so the "
            "ranking of the pairs says little"
        )
    return (
        f"The probabilities add up to about {expected:.0f} wrong labels, more than "
        "this rule finds. To act on the most suspicious pairs, read review.csv and "
        "pass --action-top N"
    )


def review_csv(suspects: Sequence[Record]) -> bytes:
    """`review.csv`: the suspicious pairs, with shortened texts, as a spreadsheet.

    Texts are on one line.  An apostrophe before a formula keeps spreadsheets from
    computing it.  The encoding is UTF-8 with a byte order mark, which Excel needs.
    """
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for record in suspects:
        numbers = (
            *(record["rank"], record["row"]),
            *(f"{1 - record['p_correct']:.4f}", f"{record['margin']:.4f}"),
        )
        texts = [plain_cell(record[name] or "") for name in COLUMNS[4:]]
        writer.writerow([*numbers, *texts])
    return file.getvalue().encode("utf-8-sig")


def plain_cell(text: str) -> str:
    """A text on one line, shortened, that no spreadsheet reads as a formula."""
    printed = "".join(x if x.isprintable() else " " for x in text[: 4 * SHORT])
    line = " ".join(printed.split())
    if len(line) > SHORT or len(text) > 4 * SHORT:
        line = f"{line[:SHORT].rstrip()} …"
    return _FORMULA.sub(r"\1'\2", line)
