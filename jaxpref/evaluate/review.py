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
    *("prompt", "chosen", "rejected", "gain", "verdict", "id"),
)
"""Columns of `review.csv`: `suspicion` is the probability that the label is wrong,
`gain` is from `gains`, and a person fills in `verdict` (see `verdicts`)."""
SHORT = 300
"""Characters of a text in `review.csv`."""
DONE = {
    "drop": "dropped",
    "relabel": "relabeled",
    "soft": "given `p_correct`",
    "recycle": "dropped or relabeled",
}
"""What an action did to a pair, by the action."""
# Spreadsheets compute cells that begin with these, and some split cells at a semicolon.
_FORMULA = re.compile(r"(^|;)(\s*[=+\-@\uff0b\uff0d\uff1d\uff20])")


def actions(
    posterior: np.ndarray,
    order: np.ndarray,
    *,
    action: str,
    threshold: float,
    top: int | None,
) -> np.ndarray:
    """What to do with each pair: "keep", "drop", "relabel" or "soft", str [N].

    Args:
      posterior: the probability that each label is right, [N].
      order: the pairs, most suspicious first, [N].
      action: "soft" applies to all; "drop" and "relabel" apply to some; "recycle"
        keeps, relabels, or drops a pair.
      threshold: "drop" and "relabel" apply to pairs with a probability below this;
        "recycle" keeps a pair with at least this probability, relabels it if its other
        order has at least this probability, and drops it otherwise.
      top: "drop" and "relabel" apply to this many of the most suspicious pairs instead,
        if it is not None.
    """
    if action == "recycle":
        swapped = np.where(1 - posterior >= threshold, "relabel", "drop")
        return np.where(posterior >= threshold, "keep", swapped)
    chosen = np.ones(len(posterior), bool)
    if action != "soft" and top is None:
        chosen = posterior < threshold
    elif action != "soft":
        chosen = np.isin(np.arange(len(posterior)), order[:top])
    return np.where(chosen, action, "keep")


def gains(posterior: np.ndarray, actions: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """What reviewing each pair is expected to gain, in labels; [N].

    In `clean.jsonl`, a right label counts 1, a wrong one -1, and a dropped pair 0.  A
    pair whose label is verified counts 1.  So reviewing a pair whose label is right
    with probability p gains 2 (1 - p) if the pair would be kept, 2 p if it would be
    relabeled, and 1 if it would be dropped.  A verdict settles all votes on the same
    two texts, whose gains are added.

    Args:
      posterior: p, [N].
      actions: from `actions`, [N].
      texts: which votes judge the same two texts, 0, 1, ...; [N].
    """
    kept, relabeled = 2 * (1 - posterior), 2 * posterior
    alone = np.where(actions == "relabel", relabeled, kept)
    alone = np.where(actions == "drop", 1.0, alone)
    return np.bincount(texts, alone)[texts]


def worth_a_look(
    gain: np.ndarray, order: np.ndarray, texts: np.ndarray, *, budget: int
) -> np.ndarray:
    """The most suspicious vote on each of the `budget` texts with the largest gains."""
    ranked = order[np.argsort(-gain[order], kind="stable")]
    _, first = np.unique(texts[ranked], return_index=True)
    return ranked[np.sort(first)[:budget]]


def rule(action: str, count: int, of: int, *, threshold: float, top: int | None) -> str:
    """By which rule `count` of the pairs were dropped or changed, in a sentence."""
    which = "all of them"
    if action == "recycle":
        which = (
            f"a label is kept if it is right with a probability of at least "
            f"{threshold:g}, swapped if it is wrong with at least that probability, "
            "and dropped otherwise"
        )
    elif action != "soft":
        which = (
            f"those whose label is right with a probability below {threshold:g}"
            if top is None
            else "the most suspicious ones"
        )
    return f"{count} of {of} pairs were {DONE[action]}: {which}"


def advice(summary: Record) -> str | None:
    """What to do if the rule changed few pairs; None if there is nothing to say."""
    acted, expected = summary["acted_on"], summary["expected_wrong"]
    if (
        acted["action"] in ("soft", "recycle")
        or acted["top"]
        or acted["pairs"] >= expected / 2
    ):
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
        texts = [plain_cell(record[name] or "") for name in COLUMNS[4:9]]
        verdict = record.get("verdict") or ""
        more = (f"{record['gain']:.4f}", verdict, record["id"])
        writer.writerow([*numbers, *texts, *more])
    return file.getvalue().encode("utf-8-sig")


def plain_cell(text: str) -> str:
    """A text on one line, shortened, that no spreadsheet reads as a formula."""
    printed = "".join(x if x.isprintable() else " " for x in text[: 4 * SHORT])
    line = " ".join(printed.split())
    if len(line) > SHORT or len(text) > 4 * SHORT:
        line = f"{line[:SHORT].rstrip()} …"
    return _FORMULA.sub(r"\1'\2", line)
