"""Records by index: the protocol, records in memory, and several sources as one."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, Protocol


class Source(Protocol):
    """Records by index, each with a location for errors."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int) -> Any:
        """The decoded record; a dict if it is well formed."""
        ...

    def location(self, index: int) -> str:
        """The location of the record, for errors: "pairs.jsonl row 17"."""
        ...


class ListSource:
    """Records in memory."""

    def __init__(
        self, records: Sequence[Any], name: str = "records", *, first_row: int = 1
    ):
        """The first record is in row `first_row` of what `name` names."""
        self._records, self._name, self._first = records, name, first_row

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def location(self, index: int) -> str:
        """The name and the row."""
        return f"{self._name} row {self._first + index}"


class Joined:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        part, row = self._find(index)
        return part[row]

    def location(self, index: int) -> str:
        """The location in the part that has the record."""
        part, row = self._find(index)
        return part.location(row)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        if index < 0 or number == len(self._parts):
            raise IndexError(f"record {index} of {len(self)}")
        return self._parts[number], index - (self._ends[number - 1] if number else 0)
