"""Sources of which processes read parts, and what identifies the content of a part."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jaxpref.errors import InputError

_DECODED = (dict, list, str, int, float, bool, type(None))


class Divisible:
    """A source that can be divided by rows; a row may hold several records.

    These methods read the rows.  Subclasses that can do with less override them.
    """

    def __len__(self) -> int:
        """Number of records."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        """The decoded record."""
        raise NotImplementedError

    def location(self, index: int) -> str:
        """The location of the record, for errors."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self)

    def row_location(self, row: int) -> str:
        """The location of a row, for errors."""
        return self.location(row)

    def records(self, row: int) -> list[tuple[str, str, Any]]:
        """The records of a row: what tells it from the others, location, and record.

        Raises:
          InputError: if the row is malformed.
        """
        return [("", self.location(row), self[row])]

    def part(self, start: int, stop: int) -> "Divisible":
        """A source of the rows from `start` to `stop`, which can be pickled."""
        rows = range(start, stop)
        return ReadRows(self._decoded(start, stop), [self.location(n) for n in rows])

    def content(self, start: int, stop: int) -> bytes | None:
        """What identifies the content of rows: equal only if the decoded rows are.

        None if nothing does.
        """
        return content_of(self._decoded(start, stop))

    def _decoded(self, start: int, stop: int) -> list[Any]:
        """The rows; an InputError for one that is malformed."""
        found = []
        for row in range(start, stop):
            try:
                found.append(self[row])
            except InputError as error:
                found.append(error)
        return found


class ReadRows(Divisible):
    """Rows that were read from another source."""

    def __init__(self, rows: Sequence[Any], locations: Sequence[str]):
        """A row that could not be read is an InputError."""
        self._rows, self._locations = rows, locations

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        row = self._rows[index]
        if isinstance(row, InputError):
            raise row
        return row

    def location(self, index: int) -> str:
        """The location in the other source."""
        return self._locations[index]


def content_of(rows: Sequence[Any]) -> bytes | None:
    """SHA-256 of rows in memory; None if they are not what JSON decodes to."""
    digest = hashlib.sha256()
    for row in rows:
        # A subclass may hold more than JSON writes, such as where a view comes from.
        if type(row) not in (*_DECODED, InputError):
            return None
        try:
            text = f"{row!r}" if isinstance(row, InputError) else json.dumps(row)
        except (TypeError, ValueError, RecursionError):
            return None
        digest.update(f"{len(text)} {text}\n".encode("utf-8", "surrogatepass"))
    return digest.digest()
