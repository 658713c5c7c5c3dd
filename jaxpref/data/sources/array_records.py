"""ArrayRecord files whose records are JSON objects."""

import functools
from pathlib import Path
from typing import Any

from jaxpref.data.sources.contents import file_digest
from jaxpref.data.sources.divisible import Divisible
from jaxpref.data.sources.json_files import decode_json
from jaxpref.data.sources.optional import import_optional
from jaxpref.errors import InputError, first_line
from jaxpref.files import check_regular

SUFFIXES = (".array_record", ".arrayrecord")


class ArrayRecords(Divisible):
    """The records of an ArrayRecord file, read and decoded on access."""

    def __init__(self, path: Path, name: str):
        """Raises InputError if it is not an ArrayRecord file."""
        check_regular(path)
        module = "array_record.python.array_record_data_source"
        package = import_optional(module, name, extra="tfds")
        self._path, self._name = path, name
        try:
            self._records = package.ArrayRecordDataSource([str(path)])
            self._count = len(self._records)
        except Exception as error:
            raise InputError(f"{name}: cannot be read ({first_line(error)})") from None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return decode_json(self._records[index], self.location(index))

    def location(self, index: int) -> str:
        """Rows count from 1."""
        return f"{self._name} row {index + 1}"

    def content(self, start: int, stop: int) -> bytes:
        """See `Divisible`."""
        return self._digest + f" {start} {stop}".encode()

    @functools.cached_property
    def _digest(self) -> bytes:
        return file_digest(self._path, self._name)
