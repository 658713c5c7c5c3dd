"""Verdicts of a person on labels, read back from a review list."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpref.errors import InputError

RIGHT, WRONG, DROP = "right", "wrong", "drop"
VERDICTS = (RIGHT, WRONG, DROP)
"""`right`: keep the label; `wrong`: swap it; `drop`: neither answer is better."""
SEPARATORS = (",", ";", "\t")
"""Spreadsheets write one of these, depending on the language."""


class Verdict(NamedTuple):
    """What a person says of one label."""

    line: int
    """Row of the review list, from 2 after the heading; for messages."""
    row: int
    """Row of the audited file, from 1."""
    id: str
    """ID of the record."""
    verdict: str
    """One of `VERDICTS`."""


def read_verdicts(path: str | Path) -> list[Verdict]:
    """The rows of a review list with a verdict; those without one are left out.

    Raises:
      InputError: if the file cannot be read, has no column `row`, `id` or `verdict`, or
        has a verdict that is not one of `VERDICTS`.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 ({error}); save the review list as CSV "
            "UTF-8"
        ) from error
    heading = text.split("\n", 1)[0]
    separator = max(SEPARATORS, key=heading.count)
    reader = csv.DictReader(text.splitlines(), delimiter=separator)
    for name in ("row", "id", "verdict"):
        if name not in (reader.fieldnames or ()):
            raise InputError(
                f"{path}: no column {name!r}; keep the columns of review.csv, and "
                f"write {', '.join(VERDICTS)} into the column 'verdict'"
            )
    found = []
    for line, cells in enumerate(reader, 2):
        said = (cells["verdict"] or "").strip().lower()
        if not said:
            continue
        if said not in VERDICTS:
            raise InputError(
                f"{path} row {line}: verdict {said!r:.40}; write "
                f"{', '.join(VERDICTS)}, or leave it empty"
            )
        if not (cells["row"] or "").strip().isdecimal():
            raise InputError(
                f"{path} row {line}: row {cells['row']!r:.40} is not a number; restore "
                "it from review.csv"
            )
        found.append(Verdict(line, int(cells["row"]), cells["id"] or "", said))
    return found


def settle(
    verdicts: list[Verdict],
    path: str,
    *,
    rows: np.ndarray,
    ids: np.ndarray,
    texts: np.ndarray,
    orientation: np.ndarray,
) -> np.ndarray:
    """The verdict on each label, str [N]; "" without one.

    A verdict on a label also settles the other labels on the same two texts.

    Args:
      verdicts: from `read_verdicts`.
      path: their file, for messages.
      rows: row of each label in its file, from 1; [N].
      ids: ID of each label's record, [N].
      texts: which labels judge the same two texts, 0, 1, ...; [N].
      orientation: +1 or -1, which text each label prefers; [N].

    Raises:
      InputError: if a verdict is on a row that was not judged or holds another record,
        or two verdicts contradict each other.
    """
    place = {int(row): n for n, row in enumerate(rows)}
    # Which of two texts is better: +1, -1, or 0 for neither; by the first verdict.
    better: dict[int, tuple[int, Verdict]] = {}
    for one in verdicts:
        n = place.get(one.row)
        if n is None or ids[n] != one.id:
            raise InputError(
                f"{path} row {one.line}: row {one.row} of the audited file is not the "
                f"record {one.id!r:.40}; apply the list to the file it was made for"
            )
        side = {RIGHT: 1, WRONG: -1, DROP: 0}[one.verdict] * int(orientation[n])
        before, first = better.setdefault(int(texts[n]), (side, one))
        if before != side:
            raise InputError(
                f"{path} row {one.line}: contradicts row {first.line}, which judges "
                "the same two texts; correct one of them"
            )
    found = []
    for item, side in zip(texts, orientation):
        preferred, _ = better.get(int(item), (None, None))
        agrees = {None: "", 0: DROP, int(side): RIGHT, -int(side): WRONG}
        found.append(agrees[preferred])
    return np.array(found)


def probabilities(posterior: np.ndarray, said: np.ndarray) -> np.ndarray:
    """The probability that each label is right, given the verdict on it; [N]."""
    return np.where(said == RIGHT, 1.0, np.where(said == WRONG, 0.0, posterior))


def check_unsaved(path: Path) -> None:
    """Raises InputError if a review list that would be overwritten has verdicts."""
    try:
        verdicts = read_verdicts(path) if path.exists() else []
    except InputError:
        return  # written before there was such a column
    if verdicts:
        raise InputError(
            f"{path}: holds {len(verdicts)} verdicts, and would be overwritten; pass "
            f"--apply {path}, or move it away"
        )
