"""Malformed records that are skipped, counted and listed."""

import collections
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxpref.data.sources import Source
from jaxpref.errors import InputError
from jaxpref.files import write_whole
from jaxpref.runtime.processes import log, only_first_process

FILE = "skipped_rows.jsonl"
"""Name of the file with the skipped rows."""
_SHOWN = 5  # reasons in the log

T = TypeVar("T")


class BadRow(NamedTuple):
    """A skipped row."""

    row: str
    """The file and row, as in messages."""
    reason: str
    """What is wrong with it."""


class BadRows:
    """The malformed rows of a source, which are errors or are skipped."""

    def __init__(self, on_bad_row: str):
        """`on_bad_row` is "raise" or "skip"; see `RecordOptions`."""
        self._skip = on_bad_row == "skip"
        self.found: list[BadRow] = []

    def attempt(self, read: Callable[[], T], place: str) -> T | None:
        """What `read` returns; None if the row is malformed and skipped.

        Args:
          read: reads the row.
          place: the file and row.

        Raises:
          InputError: if the row is malformed and not to be skipped.
        """
        try:
            return read()
        except InputError as error:
            if not self._skip:
                raise
            reason = str(error).removeprefix(place).removeprefix(":").strip()
            self.found.append(BadRow(place, reason))
            return None

    def together(
        self, read: Callable[[Sequence[int]], list[T]], places: Sequence[str]
    ) -> list[T | None]:
        """What `read` returns for rows that are quicker to read together.

        If one of them is malformed and skipped, they are read one by one.

        Args:
          read: returns one result for each of the given indices into `places`.
          places: the file and row of each.
        """
        if self._skip:
            try:
                return [*read(range(len(places)))]
            except InputError:
                each = lambda n: lambda: read([n])[0]
                return [self.attempt(each(n), x) for n, x in enumerate(places)]
        return [*read(range(len(places)))]


def read_rows(
    source: Source, read: Callable[[Any, str], T], on_bad_row: str
) -> Iterator[tuple[str, T]]:
    """The place of each row, and what `read(record, place)` returns for it.

    Malformed rows that are skipped are left out, and counted in the log at the end.

    Raises:
      InputError: if a row is malformed and not to be skipped.
    """
    bad = BadRows(on_bad_row)
    for row in range(len(source)):
        place = source.location(row)
        one = bad.attempt(lambda row=row, place=place: read(source[row], place), place)
        if one is not None:
            yield place, one
    log_skipped(bad.found)


def describe(rows: Sequence[BadRow]) -> list[str]:
    """Lines with the number of skipped rows and the most frequent reasons."""
    counts = collections.Counter(_kind(row.reason) for row in rows)
    lines = [f"{len(rows):,} malformed rows skipped:"] if rows else []
    lines += [f"  {n:,} times: {kind}" for kind, n in counts.most_common(_SHOWN)]
    more = len(counts) - _SHOWN
    return lines + ([f"  and {more:,} other reasons"] if more > 0 else [])


def log_skipped(rows: Sequence[BadRow]) -> None:
    """Logs `describe`."""
    for line in describe(rows):
        log(f"warning: {line}" if not line.startswith(" ") else line)


def write_skipped(out: Path, rows: Sequence[BadRow], on_bad_row: str) -> None:
    """Writes the skipped rows to OUT, if rows may be skipped; one process writes."""
    if on_bad_row == "skip":
        lines = (json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
        only_first_process(write_whole, out / FILE, "".join(lines))


def _kind(reason: str) -> str:
    """The first clause of a reason, which rows with the same problem share."""
    return reason.partition(";")[0].partition(", but")[0][:200]
