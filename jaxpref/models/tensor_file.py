"""The safetensors format, read lazily and written one tensor at a time.

A file is an 8-byte little-endian header length, a JSON header and the raw bytes.
Reading maps the file, so a process touches only the bytes of its own shards; writing
streams, so memory holds one tensor; and bfloat16 needs no support from another package.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxpref.errors import InputError

DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file by name, as read-only views of the mapped file.

    Raises:
        InputError: not a safetensors file, a truncated one, or another dtype than
            float32, float16 and bfloat16.
    """
    broken = f"{path}: not a complete safetensors file; copy or download it again"
    try:
        data = np.memmap(path, np.uint8, mode="r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if begin > data.size:
            raise InputError(broken)
        header = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        return {name: _view(path, name, data[begin:], header[name]) for name in header}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the folder is incomplete, copy it again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check its rights"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(broken) from None


def _view(path, name, data, entry) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{path}: tensor {name} is stored as {entry['dtype']}; convert the weights "
            "to float32, float16 or bfloat16"
        )
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
    if not 0 <= begin <= end <= data.size or end - begin != (
        math.prod(shape) * dtype.itemsize
    ):
        raise InputError(
            f"{path}: the bytes of tensor {name} are not all there; copy or download "
            "the file again"
        )
    return data[begin:end].view(dtype).reshape(shape)


def write(
    path: Path | None,
    layout: dict[str, tuple[int, ...]],
    dtype,
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes tensors of one dtype, taken one at a time in the order of `layout`.

    With `path` None nothing is written and the tensors are only drawn: so a process
    that does not write takes its part in gathering them.
    """
    dtype = np.dtype(dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    with open(os.devnull if path is None else path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.tobytes())
