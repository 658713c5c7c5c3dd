"""The bytes of a file, unpacked if they are compressed."""

import gzip
import hashlib
import mmap
import zlib
from pathlib import Path
from typing import Any

from jaxpref.data.sources.optional import import_pyarrow
from jaxpref.errors import InputError, first_line
from jaxpref.files import check_regular

MAX_RATIO = 200
"""Maximum ratio of the unpacked size of a file to its size; text has about 10."""
COMPRESSIONS = (".gz", ".zst")
_PART = 1 << 26


def read_contents(path: Path, name: str) -> bytes | mmap.mmap:
    """The contents of a file, mapped from disk unless it is compressed.

    Args:
      path: the file.
      name: what errors call it.

    Raises:
      InputError: if it cannot be read, is damaged, or unpacks to far too much.
    """
    check_regular(path)
    try:
        if path.suffix in COMPRESSIONS:
            return _unpacked(path, name)
        with open(path, "rb") as file:
            if not path.stat().st_size:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except EOFError:
        raise InputError(
            f"{name}: the compressed file ends too early; copy or download it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name}: not a valid gzip file ({error})") from None
    except OSError as error:
        why = error.strerror or first_line(error)  # pyarrow's have no strerror
        raise InputError(f"{name}: cannot be read ({why})") from None


def file_digest(path: Path, name: str) -> bytes:
    """SHA-256 of a file; raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None


def _unpacked(path: Path, name: str) -> bytes:
    """The contents of a compressed file, unless it unpacks to far too much."""
    contents, size = bytearray(), path.stat().st_size
    with _open_compressed(path, name) as file:
        while part := file.read(_PART):
            contents += part
            if len(contents) > max(_PART, MAX_RATIO * size):
                raise InputError(
                    f"{name}: unpacks to more than {MAX_RATIO} times its size, which"
                    " text never does; if you trust the file, unpack it first"
                )
    return bytes(contents)


def _open_compressed(path: Path, name: str) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path)
    return import_pyarrow(name).input_stream(str(path), compression="zstd")
