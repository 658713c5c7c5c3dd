"""Records by index: the protocol, records in memory, and several sources as one."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jaxpref.data.sources.divisible import Divisible, content_of


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


class ListSource(Divisible):
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

    def part(self, start: int, stop: int) -> "ListSource":
        """See `Divisible`."""
        rows = self._records[start:stop]
        return ListSource(rows, self._name, first_row=self._first + start)

    def content(self, start: int, stop: int) -> bytes | None:
        """See `Divisible`."""
        return content_of(self._records[start:stop])


class Joined(Divisible):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = [divisible(part) for part in parts]
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

    def part(self, start: int, stop: int) -> Divisible:
        """See `Divisible`."""
        found = [own.part(*rows) for own, *rows in self._within(start, stop)]
        return found[0] if len(found) == 1 else Joined(found)

    def content(self, start: int, stop: int) -> bytes | None:
        """See `Divisible`."""
        found = [own.content(*rows) for own, *rows in self._within(start, stop)]
        if any(x is None for x in found):
            return None
        return content_of([x.hex() for x in found if x is not None])

    def _within(self, start: int, stop: int) -> Iterator[tuple[Divisible, int, int]]:
        """The parts that hold rows, and which rows these are for them."""
        for own, end in zip(self._parts, self._ends):
            first = end - len(own)
            if start < end and first < stop:
                yield own, max(start - first, 0), min(stop, end) - first

    def _find(self, index: int) -> tuple[Divisible, int]:
        number = bisect.bisect_right(self._ends, index)
        if index < 0 or number == len(self._parts):
            raise IndexError(f"record {index} of {len(self)}")
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


class _ByRecord(Divisible):
    """Any other source, one record a row."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def location(self, index: int) -> str:
        return self._source.location(index)


def divisible(source: Source) -> Divisible:
    """The source itself if it can be divided, or one that reads it record by record."""
    return source if isinstance(source, Divisible) else _ByRecord(source)
