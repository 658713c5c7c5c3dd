"""Parquet and Arrow files, read with pyarrow one part at a time."""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpref.data.sources.contents import file_digest
from jaxpref.data.sources.divisible import Divisible
from jaxpref.data.sources.external import plain
from jaxpref.data.sources.optional import import_optional
from jaxpref.errors import InputError, first_line
from jaxpref.files import check_regular

PARQUET, ARROW = (".parquet", ".pq"), (".arrow", ".feather")
_ROWS = 1024


class Parts(Divisible):
    """The rows of a file that is stored in parts; the last one read is in memory.

    Reading in order reads every part once.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        read: Callable[[int], Any],
        name: str,
        path: Path,
    ):
        """Reads nothing.

        Args:
          sizes: the rows of each part.
          read: part n, as a `pyarrow.Table` or a record batch.
          name: what errors call the file.
          path: the file.
        """
        self._path = path
        self._ends = list(itertools.accumulate(sizes))
        self._read, self._name = read, name
        self._part: tuple[int, Any] | None = None
        self._rows: tuple[int, list[Any]] = (0, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        start, rows = self._rows
        if not start <= index < start + len(rows):
            start, rows = self._rows = self._load(index)
        return plain(rows[index - start], self.location(index))

    def location(self, index: int) -> str:
        """Rows count from 1."""
        return f"{self._name} row {index + 1}"

    def content(self, start: int, stop: int) -> bytes:
        """See `Divisible`."""
        return self._digest + f" {start} {stop}".encode()

    @functools.cached_property
    def _digest(self) -> bytes:
        return file_digest(self._path, self._name)

    def _load(self, index: int) -> tuple[int, list[Any]]:
        """The rows around one, with the index of the first."""
        number = bisect.bisect_right(self._ends, index)
        if index < 0 or number == len(self._ends):
            raise IndexError(f"record {index} of {len(self)}")
        first = self._ends[number - 1] if number else 0
        try:
            if self._part is None or self._part[0] != number:
                self._part = (number, self._read(number))
            skipped = (index - first) // _ROWS * _ROWS
            return first + skipped, self._part[1].slice(skipped, _ROWS).to_pylist()
        except Exception as error:  # whatever damaged pages make the package raise
            raise InputError(
                f"{self.location(index)}: cannot be read ({first_line(error)}); copy or"
                " download the file again"
            ) from None


def open_parquet(path: Path, name: str) -> Parts:
    """Opens a Parquet file, whose row groups are read one by one.

    Raises:
      InputError: if it is not a Parquet file, or pyarrow is not installed.
    """
    check_regular(path)
    parquet = import_optional("pyarrow.parquet", name, extra="hub")
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        groups = range(file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(n).num_rows for n in groups]
    except Exception as error:  # not Parquet, damaged, or encrypted
        raise _unreadable(name, error) from None
    return Parts(sizes, file.read_row_group, name, path)


def open_arrow(path: Path, name: str) -> Parts:
    """Opens an Arrow IPC file or stream, mapped from disk.

    Raises:
      InputError: if it is neither, or pyarrow is not installed.
    """
    check_regular(path)
    pyarrow = import_optional("pyarrow", name, extra="hub")
    try:
        mapped = pyarrow.memory_map(str(path))
        try:
            reader = pyarrow.ipc.open_file(mapped)
            batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:  # as `datasets` writes it
            mapped.seek(0)
            batches = list(pyarrow.ipc.open_stream(mapped))
    except Exception as error:
        raise _unreadable(name, error) from None
    return Parts([len(batch) for batch in batches], batches.__getitem__, name, path)


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: cannot be read ({first_line(error)})")
