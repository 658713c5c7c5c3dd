"""Opening, indexing, and writing the safetensors files of a model folder."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpref.errors import InputError
from jaxpref.files import check_regular, read_json, write_json
from jaxpref.models.families.family import StoredArray, join
from jaxpref.models.layout import one_of
from jaxpref.runtime.heartbeat import beat

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of weights: names in the file format, and in NumPy."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_file(path: Path) -> dict[str, Any]:
    """The tensors of a file by name; indexing one reads that part of it from disk.

    Raises:
        InputError: if it cannot be read.
    """
    check_regular(path)
    try:
        file = safe_open(path, framework="np")
        tensors = {name: file.get_slice(name) for name in file.keys()}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the folder is incomplete, copy it again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error}); check its permissions"
        ) from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); copy or download it "
            "again"
        ) from None
    return tensors


def open_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of all files of a folder by name; only headers are read.

    Raises:
        InputError: if a file is missing or cannot be read.
    """
    if (folder / WEIGHTS).exists():
        return open_file(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise InputError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; only safetensors are read, "
            "so convert other weights first"
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in index.values()
    ):
        raise InputError(
            f"{folder / INDEX}: weight_map is not a table of tensor and file names"
        )
    tensors = {}
    for file in sorted(set(index.values())):
        tensors |= open_file(folder / file)
    for name, file in index.items():
        if name not in tensors:
            raise InputError(f"{folder / file}: tensor {name} is indexed, but missing")
    return tensors


def stored_with(folder: Path | None, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The tensors of a folder whose names begin with one of the prefixes."""
    if folder is None or not prefixes:
        return {}
    tensors = open_tensors(folder).items()
    return {name: tensor for name, tensor in tensors if name.startswith(prefixes)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write: one or several arrays, or one layer of each."""

    tensor: str
    parts: list[tuple[StoredArray, Any]]
    index: tuple[int, ...]
    """Where the tensor is in the leading axes of the arrays."""


def entries(arrays: Iterable[tuple[StoredArray, Any]]) -> list[Entry]:
    """The tensors that hold the arrays of a model, in the order of their first part."""
    together: dict[str, list[tuple[StoredArray, Any]]] = {}
    for stored, array in arrays:
        together.setdefault(stored.name.template, []).append((stored, array))
    found = []
    for parts in together.values():
        order = parts[0][0].name.parts
        parts.sort(key=lambda part: part[0].start)
        assert len(parts) == max(len(order), 1), f"some of {order} are missing"
        for index, tensor in np.ndenumerate(parts[0][0].tensors):
            found.append(Entry(tensor, parts, index))
    return found


def write_tensors(
    folder: Path | None,
    tensors: list[Entry],
    dtype: np.dtype,
    max_file_bytes: int,
    copied: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors to `folder`; if it is None, only takes part in gathering them.

    Args:
        folder: the folder, or None.
        tensors: the tensors.
        dtype: the dtype in which they are written.
        max_file_bytes: weights beyond this size are split over several files.
        copied: tensors of another folder, from `open_tensors`, written as they are.

    Raises:
        InputError: if a value is not finite in `dtype`.
    """
    parts: list[tuple[str, int, Callable[[], np.ndarray]]] = []
    for entry in tensors:
        nbytes = math.prod(entry.parts[0][0].stored_shape) * dtype.itemsize
        make = functools.partial(gather, entry, dtype)
        parts.append((entry.tensor, nbytes, make))
    if folder is not None:
        for name, tensor in (copied or {}).items():
            nbytes = math.prod(tensor.get_shape()) * 4  # or less
            parts.append((name, nbytes, functools.partial(_copy, name, tensor)))
    files, size = [{}], 0
    for name, nbytes, make in parts:
        if size + nbytes > max_file_bytes and files[-1]:
            files, size = [*files, {}], 0
        files[-1][name] = make
        size += nbytes
    write_files(folder, files)


def _copy(name: str, tensor: Any) -> np.ndarray:
    beat(f"copying {name}")
    return tensor[:]


def write_files(
    folder: Path | None, files: Sequence[Mapping[str, Callable[[], np.ndarray]]]
) -> None:
    """Writes the weights of a model folder, and their index if there are several files.

    Args:
        folder: the folder, which has a config.json already; with None, the tensors are
            made, but not written.
        files: what makes each tensor, by name, for each file.  One file's tensors are
            in memory at a time.
    """
    index, total = {}, 0
    for i, tensors in enumerate(files):
        file = WEIGHTS
        if len(files) > 1:
            file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        values = {name: make() for name, make in tensors.items()}
        index |= dict.fromkeys(values, file)
        total += sum(value.nbytes for value in values.values())
        if folder is not None:
            save_file(values, folder / file, metadata={"format": "pt"})
            # The library creates files that only their owner can read.
            shutil.copymode(folder / "config.json", folder / file)
        del values  # before those of the next file are made
    if len(files) > 1 and folder is not None:
        table = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / INDEX, table)


def gather(entry: Entry, dtype: np.dtype) -> np.ndarray:
    """The value of a tensor, on every process.

    Raises:
        InputError: if a value is not finite in `dtype`.
    """
    beat(f"exporting {entry.tensor}")
    parts = []
    for stored, array in entry.parts:
        value: Any = one_of(array, entry.index) if entry.index else array
        sharding = getattr(value, "sharding", None)
        if isinstance(sharding, NamedSharding) and not value.is_fully_addressable:
            value = jax.device_put(value, NamedSharding(sharding.mesh, P()))
        with np.errstate(over="ignore"):
            value = np.asarray(value).astype(dtype)
        if not np.isfinite(value).all():
            raise InputError(
                f"tensor {entry.tensor} is not finite in {dtype}; nothing was saved"
            )
        parts.append((stored, value))
    return np.ascontiguousarray(join(parts))  # or the library saves another order
