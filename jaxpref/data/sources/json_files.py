"""JSON Lines, JSON lists, and JSON objects that hold one list of records."""

import hashlib
import json
import mmap
from array import array
from pathlib import Path
from typing import Any

from jaxpref.data.sources.contents import read_contents
from jaxpref.data.sources.divisible import Divisible
from jaxpref.data.sources.source import ListSource, Source
from jaxpref.errors import InputError

LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one JSON object per line."""

CONTAINERS = ("data", "records", "rows", "examples", "instances")
"""Fields of a JSON object that may hold the list of all records."""


class JsonLines(Divisible):
    """One JSON object per line, decoded on access; blank lines are skipped.

    If the contents are mapped from disk, only offsets are in memory (24 bytes per
    line).  Rows in errors are line numbers, from 1.
    """

    def __init__(self, contents: bytes | mmap.mmap, name: str, *, first_line: int = 1):
        """`first_line` is the number in the file of the first line of `contents`."""
        self._bytes, self._name = contents, name
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        start, line, size = 0, first_line - 1, len(contents)
        while start < size:
            line += 1
            end = contents.find(b"\n", start)
            end = size if end < 0 else end
            if end - start > 80 or contents[start:end].strip():
                self._starts.append(start)
                self._ends.append(end)
                self._lines.append(line)
            start = end + 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        raw = self._bytes[self._starts[index] : self._ends[index]]
        return decode_json(raw, self.location(index))

    def location(self, index: int) -> str:
        """The file and its line."""
        return f"{self._name} row {self._lines[index]}"

    def part(self, start: int, stop: int) -> "JsonLines":
        """See `Divisible`."""
        lines = self._bytes[self._starts[start] : self._ends[stop - 1]]
        return JsonLines(lines, self._name, first_line=self._lines[start])

    def content(self, start: int, stop: int) -> bytes:
        """See `Divisible`."""
        lines = self._bytes[self._starts[start] : self._ends[stop - 1]]
        return hashlib.sha256(lines).digest()


def open_json(path: Path, name: str) -> Source:
    """Opens a JSON or JSONL file, maybe compressed.

    A .json file may hold a list of records, an object with such a list in one of the
    fields in `CONTAINERS`, such as {"data": [...]}, or JSON Lines, as is common.

    Args:
      path: the file.
      name: what errors call it.

    Raises:
      InputError: if it cannot be read, or is not JSON.
    """
    contents = read_contents(path, name)
    if any(suffix in LINES for suffix in path.suffixes[-2:]):
        return JsonLines(contents, name)
    first = contents[:100].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return ListSource(decode_json(contents[:], name), name)
    lines = JsonLines(contents, name)
    if first == b"{" and (len(lines) == 1 or not _is_json(lines)):
        if records := _contained(contents[:], name):
            return ListSource(records, name)
    return lines


def decode_json(raw: bytes, where: str) -> Any:
    """UTF-8 JSON to Python values; `where` names the place in an error."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {raw[error.start]:#04x} at position {error.start + 1} is"
            " not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg} at character {error.pos + 1}); a .jsonl"
            " file holds one JSON object per line"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: not usable JSON ({error})") from None


def _is_json(lines: JsonLines) -> bool:
    """Whether the first line is an object of its own, not the start of one."""
    try:
        return isinstance(lines[0], dict)
    except InputError:
        return False


def _contained(contents: bytes, name: str) -> list[dict]:
    """The list of records in a JSON object; empty if there is none."""
    try:
        whole = decode_json(contents, name)
    except InputError:
        return []  # reading it as lines names the line that is wrong
    lists = [whole[field] for field in CONTAINERS if isinstance(whole.get(field), list)]
    objects = [x for x in lists if x and all(isinstance(item, dict) for item in x)]
    return objects[0] if len(objects) == 1 else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice[:100]!r} occurs twice; keep one of them")
    return record
