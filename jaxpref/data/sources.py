"""Random access to records on disk: JSON Lines, JSON, and others by name."""

import gzip
import json
import mmap
import urllib.parse
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxpref.data import external
from jaxpref.errors import InputError
from jaxpref.files import check_regular

MAX_RATIO = 200
"""Maximum ratio of the unpacked size of a gzip file to its size; text has about 10."""
_PART = 1 << 26
_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_KINDS = (
    "a .jsonl, .json, .jsonl.gz or .json.gz file, a folder written by"
    " datasets.save_to_disk or by TFDS, hf:OWNER/NAME, or tfds:NAME"
)


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

    def __init__(self, records: Sequence[Any], name: str = "records"):
        self._records, self._name = records, name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def location(self, index: int) -> str:
        """Rows count from 1."""
        return f"{self._name} row {index + 1}"


class JsonLines:
    """One JSON object per line, decoded on access; blank lines are skipped.

    If the contents are mapped from disk, only offsets are in memory (24 bytes per
    line).  Rows in errors are line numbers, from 1.
    """

    def __init__(self, contents: bytes | mmap.mmap, name: str):
        self._bytes, self._name = contents, name
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        start, line, size = 0, 0, len(contents)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice[:100]!r} occurs twice; keep one of them")
    return record


def open_source(
    data: str | Path, *, split: str | None = None, data_dir: str | None = None
) -> Source:
    """Opens preference data of any supported kind.

    Args:
      data: a file (.jsonl, .json, either with .gz), a folder written by
        `datasets.save_to_disk`, a folder of a prepared TFDS dataset, "hf:OWNER/NAME" or
        "hf:OWNER/NAME:CONFIG" or a bare OWNER/NAME for the Hugging Face hub, or
        "tfds:NAME" or "tfds:NAME/CONFIG:VERSION".  "?split=test" and
        "?data_dir=DIR" (or both with "&") may follow any name but a file's.
      split: the split of a dataset that has splits (default: "train"); an error for
        others.
      data_dir: where a TFDS dataset was prepared, or the folder inside a hub dataset
        (Anthropic/hh-rlhf has "helpful-base"); an error for others.

    Raises:
      InputError: if there is nothing usable, or an optional package is missing.
    """
    text = str(data)
    if "?" in text and not _exists(text):
        text, _, query = text.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        if not options or options.keys() - {"split", "data_dir"}:
            raise InputError(f"{data}: only split=NAME and data_dir=DIR may follow '?'")
        split, data_dir = options.get("split", split), options.get("data_dir", data_dir)
    if text.startswith("tfds:"):
        return external.open_tfds(text[5:], split=split or "train", data_dir=data_dir)
    if text.startswith("hf:"):
        return external.open_hub(text[3:], split=split or "train", data_dir=data_dir)
    if _exists(text):
        path = Path(text)
        if data_dir is not None:
            raise InputError(f"{text}: leave out data_dir {data_dir!r}; it is on disk")
        if path.is_dir():
            return _open_folder(path, split)
        if split is not None:
            raise InputError(f"{text}: a file has no splits; leave out split {split!r}")
        return _open_json(path)
    looks_like_hub_id = (
        text.count("/") == 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith(_JSON_SUFFIXES)
        and not _exists(text.split("/")[0])
    )
    if looks_like_hub_id:
        return external.open_hub(text, split=split or "train", data_dir=data_dir)
    raise InputError(f"{text}: no such file or folder; give {_KINDS}")


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{text[:200]}: cannot be read ({error})") from None


def _open_folder(path: Path, split: str | None) -> Source:
    for file in path.rglob("*"):
        if not file.is_dir():
            check_regular(file)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return external.open_saved(path, split=split)
    if (path / "features.json").is_file():
        return external.open_tfds_folder(path, split=split or "train")
    raise InputError(f"{path}: this folder holds no dataset; give {_KINDS}")


def _open_json(path: Path) -> Source:
    name = str(path)
    if not name.endswith(_JSON_SUFFIXES):
        raise InputError(f"{name}: unknown kind of file; give {_KINDS}")
    contents = _contents(path)
    first = contents[:100].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if ".jsonl" not in path.name and first == b"[":
        source: Source = ListSource(decode_json(contents[:], name), name)
    else:  # many .json files hold JSON Lines
        source = JsonLines(contents, name)
    if not len(source):
        raise InputError(f"{name}: holds no records")
    return source


def _contents(path: Path) -> bytes | mmap.mmap:
    check_regular(path)
    try:
        if path.suffix == ".gz":
            return _unpacked(path)
        with open(path, "rb") as file:
            if not path.stat().st_size:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except EOFError:
        raise InputError(
            f"{path}: the gzip file ends too early; copy or download it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a valid gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _unpacked(path: Path) -> bytes:
    """The contents of a gzip file, unless it was made to fill up the memory."""
    contents, size = bytearray(), path.stat().st_size
    with gzip.open(path) as file:
        while part := file.read(_PART):
            contents += part
            if len(contents) > max(_PART, MAX_RATIO * size):
                raise InputError(
                    f"{path}: unpacks to more than {MAX_RATIO} times its size, which"
                    " text never does; if the file is right, unpack it yourself"
                )
    return bytes(contents)
