"""Writing a merged model, tensor by tensor."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from jaxpref.errors import InputError
from jaxpref.files import cannot_write, read_json, write_json
from jaxpref.merge.adapter import AdapterMerge
from jaxpref.merge.inputs import ModelFolder
from jaxpref.merge.options import Weights
from jaxpref.models.folder import move_into_place
from jaxpref.models.tensor_files import DTYPES, write_files
from jaxpref.models.tokenizer_files import copy_tokenizer

RECORD = "merge.json"
"""The file of a merged model that says what it was made from."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """What is merged, and how."""

    folders: Sequence[ModelFolder]
    """The models, whose tensors agree; a base comes first."""
    source: ModelFolder
    """The one whose dtypes, buffers, config and tokenizer the merged model has."""
    combine: Callable[[Iterator[np.ndarray], Sequence[float]], np.ndarray]
    """Computes a tensor from those of `folders`, in order, and the weights."""
    weights: Weights
    """The weights of each tensor."""

    def tensor(self, name: str) -> np.ndarray:
        """One merged tensor, float32; reads only the tensors of this name.

        Raises:
          InputError: if a model's tensor, or the result, is not finite.
        """
        tensors = (folder.read(name) for folder in self.folders)
        with np.errstate(over="ignore", invalid="ignore"):
            merged = self.combine(tensors, self.weights.of(name))
        if not np.isfinite(merged).all():
            for folder in self.folders:
                if not np.isfinite(folder.read(name)).all():
                    raise InputError(
                        f"{folder.name}: tensor {name} holds NaN or infinite values"
                    )
            raise InputError(
                f"tensor {name}: is not finite with these weights; use smaller ones"
            )
        return merged


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a model's weights."""

    tensors: int
    weights: int
    bytes: int


def write_merge(
    folder: Path,
    merge: Merge | AdapterMerge,
    dtype: str | None,
    record: Mapping[str, Any],
    *,
    max_file_bytes: int = 5_000_000_000,
) -> Size:
    """Writes a merged model: weights, `RECORD`, and the other files of its source.

    Everything is written to a temporary folder next to `folder` and then moved, so a
    crash leaves no half-written model.  A tied LM head is left out.

    Args:
      folder: the folder; its own files of an earlier merge are replaced.
      merge: what is merged.
      dtype: dtype of the weights; by default each tensor's in the source.
      record: the content of `RECORD`.
      max_file_bytes: weights beyond this size are split over several files; one file's
        weights are held in memory at a time.

    Raises:
      InputError: if it cannot be written, or a value is not finite in its dtype.
    """
    folder = folder.resolve()
    temporary = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_config(merge.source, temporary, dtype)
        files, size = _files(merge, dtype, max_file_bytes)
        write_files(temporary, files)
        copy_tokenizer(merge.source.path, temporary, None)
        write_json(temporary / RECORD, dict(record))
        move_into_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _write_config(source: ModelFolder, folder: Path, dtype: str | None) -> None:
    fields = read_json(source.path / "config.json")
    if dtype is not None:
        fields = {name: value for name, value in fields.items() if name != "dtype"}
        fields["torch_dtype"] = dtype
    write_json(folder / "config.json", fields)


def _files(
    merge: Merge | AdapterMerge, dtype: str | None, max_file_bytes: int
) -> tuple[list[dict[str, Callable[[], np.ndarray]]], Size]:
    """How to make each tensor of each file, and the size of all weights."""
    source = merge.source
    parts: list[tuple[str, int, Callable[[], np.ndarray]]] = []
    count = 0
    for name in source.weights:
        kept = DTYPES[source.stored[name].get_dtype()]
        stored_dtype = np.dtype(jnp.dtype(dtype or kept))
        values = math.prod(source.stored[name].get_shape())
        make = functools.partial(_stored, merge, name, stored_dtype)
        parts.append((name, values * stored_dtype.itemsize, make))
        count += values
    total = sum(nbytes for _, nbytes, _ in parts)
    size = Size(tensors=len(parts), weights=count, bytes=total)
    # Buffers are small.
    parts += [
        (name, 0, functools.partial(source.read, name)) for name in source.buffers
    ]
    files, filled = [{}], 0
    for name, nbytes, make in parts:
        if filled + nbytes > max_file_bytes and files[-1]:
            files, filled = [*files, {}], 0
        files[-1][name] = make
        filled += nbytes
    return files, size


def _stored(merge: Merge | AdapterMerge, name: str, dtype: np.dtype) -> np.ndarray:
    merged = merge.tensor(name)
    with np.errstate(over="ignore"):
        values = merged.astype(dtype, copy=False)
    if not np.isfinite(values).all():
        raise InputError(
            f"tensor {name}: a merged value of {np.abs(merged).max():.3g} is not "
            f"finite in {dtype}; use --dtype bfloat16 or float32"
        )
    return np.ascontiguousarray(values)
