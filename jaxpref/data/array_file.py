"""Arrays by name in one block of bytes, as it is in a file, with a digest of all.

The digest, 16 bytes of BLAKE2b; the size of the header, 8 bytes; the header in JSON;
the arrays, each from a multiple of 8 bytes on.
"""

import hashlib
import json
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

Buffer = bytes | mmap.mmap
_DIGEST, _SIZE, _ALIGN = 16, 8, 8


class Damaged(ValueError):
    """The bytes are not what was written."""


def pack(arrays: Mapping[str, np.ndarray], about: Any) -> bytes:
    """The bytes of arrays, and of a description that JSON can encode."""
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    shapes = {name: [x.dtype.str, x.shape] for name, x in arrays.items()}
    header = _padded(json.dumps({"about": about, "arrays": shapes}).encode())
    parts = [len(header).to_bytes(_SIZE, "little"), header]
    parts += [_padded(x.tobytes()) for x in arrays.values()]
    content = b"".join(parts)
    return _digest(content) + content


def unpack(buffer: Buffer) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays, which read from the buffer, and the description.

    Raises:
      Damaged: if a byte has changed, or some are missing.
    """
    with memoryview(buffer) as view:
        if len(view) < _DIGEST + _SIZE or _digest(view[_DIGEST:]) != view[:_DIGEST]:
            raise Damaged("the digest is of other bytes")
        start = _DIGEST + _SIZE
        size = int.from_bytes(view[_DIGEST:start], "little")
        header = json.loads(bytes(view[start : start + size]))
    start += size
    arrays = {}
    for name, (dtype, shape) in header["arrays"].items():
        count = int(np.prod(shape))
        array = np.frombuffer(buffer, dtype, count, start) if count else np.empty(0)
        arrays[name] = array.astype(dtype, copy=False).reshape(shape)
        start += -(-array.nbytes // _ALIGN) * _ALIGN
    return arrays, header["about"]


def _padded(data: bytes) -> bytes:
    # A JSON header may end with spaces; zeros would do for arrays alone.
    return data + b" " * (-len(data) % _ALIGN)


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
