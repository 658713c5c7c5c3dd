"""Numbers by key, in a folder that several runs may write to at the same time.

A folder holds shards, safetensors files that appear whole and are never changed, each
named by the SHA-256 of its content: a damaged one is known by its name.  Nothing needs
a lock: who writes the same numbers writes the same file.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxpref.files import cannot_write, write_whole

_log = logging.getLogger("jaxpref")


def read(folder: Path, keys: np.ndarray) -> np.ndarray:
    """The numbers of `keys`, NaN where the folder has none that is finite.

    Args:
      folder: of the shards; it need not exist.
      keys: str, any shape.

    Returns:
      float32 of the shape of `keys`.  Of several numbers of a key the one in the first
      shard by name.
    """
    shards = [_load(path) for path in sorted(folder.glob("*.safetensors"))]
    shards = [shard for shard in shards if shard is not None and len(shard[0])]
    values = np.full(keys.shape, np.nan, np.float32)
    if not shards:
        return values
    names, numbers = (np.concatenate(parts) for parts in zip(*shards))
    names, numbers = names[np.isfinite(numbers)], numbers[np.isfinite(numbers)]
    names, first = np.unique(names, return_index=True)
    wanted = keys.astype(np.bytes_)
    place = np.searchsorted(names, wanted)
    place[place == len(names)] = 0
    found = names[place] == wanted if len(names) else np.zeros(keys.shape, bool)
    values[found] = numbers[first][place[found]]
    return values


def append(
    folder: Path, keys: np.ndarray, values: np.ndarray, about: Mapping[str, str]
) -> None:
    """Adds one shard.

    Args:
      folder: of the shards; made if missing.
      keys: str of one length, any shape; a key that occurs twice is written once.
      values: float32 of the same shape.
      about: what the numbers are, for who looks into the file.

    Raises:
      InputError: if it cannot be written.
    """
    names, first = np.unique(keys.astype(np.bytes_), return_index=True)
    size = names.dtype.itemsize
    tensors = {
        "keys": names.view(np.uint8).reshape(-1, size),
        "values": values.ravel()[first],
    }
    # In one entry: of several, safetensors writes now this, now that one first.
    content = save(tensors, metadata={"about": json.dumps(dict(about))})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_whole(folder / f"{_digest(content)}.safetensors", content)


def _load(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys, as bytes, and values of a shard; None if it is damaged or gone."""
    try:
        content = path.read_bytes()
        whole = _digest(content) == path.stem
        tensors = load(content) if whole else {}
        keys, values = tensors["keys"], tensors["values"]
    except OSError as error:
        _log.warning("%s: cannot be read (%s)", path, error.strerror or error)
        return None
    except (SafetensorError, KeyError):
        _log.warning("%s: is damaged; what it held is computed again", path)
        with contextlib.suppress(OSError):  # where others' folders are read only
            path.unlink()
        return None
    return keys.view(f"S{keys.shape[1]}").ravel(), values


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
