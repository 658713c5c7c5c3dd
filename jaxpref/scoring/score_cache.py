"""Numbers by key, in a folder that several runs may write to at the same time.

A folder contains shards: safetensors files that are written atomically and never
changed.  Each is named by the SHA-256 of its content, so damage can be detected, and
records what its numbers were computed with.  No lock is needed: processes that write
the same numbers write the same file.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxpref.files import write_whole
from jaxpref.runtime.cache_folder import make_private, warn_if_others_write

HOLDS = "stored scores"
_log = logging.getLogger("jaxpref")


def read(
    folder: Path, keys: Shaped[np.ndarray, "*shape"], made_by: Mapping[str, str]
) -> Float[np.ndarray, "*shape"]:
    """The numbers of `keys`; NaN if the folder has no finite number for a key.

    Args:
      folder: the folder of the shards; it need not exist.
      keys: str, any shape.
      made_by: what the shards must say about their numbers; others are left out, with
        a warning.

    Returns:
      float32 of the shape of `keys`.  If a key has several numbers, the one in the
      first shard by name.
    """
    warn_if_others_write(folder, holds=HOLDS)
    shards = [_load(path, made_by) for path in _shards(folder)]
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
    folder: Path,
    keys: Shaped[np.ndarray, "*shape"],
    values: Float[np.ndarray, "*shape"],
    about: Mapping[str, str],
) -> None:
    """Adds one shard.

    Args:
      folder: the folder of the shards; created if missing.
      keys: str of equal length, any shape; duplicates are written once.
      values: float32 of the same shape.
      about: a description of the numbers, for readers of the file.

    Raises:
      InputError: if it cannot be written.
    """
    names, first = np.unique(keys.astype(np.bytes_), return_index=True)
    size = names.dtype.itemsize
    tensors = {
        "keys": names.view(np.uint8).reshape(-1, size),
        "values": values.ravel()[first],
    }
    # One entry only, since safetensors writes several entries in varying order.
    content = save(tensors, metadata={"about": json.dumps(dict(about))})
    make_private(folder)
    path = folder / f"{_digest(content)}.safetensors"
    write_whole(path, content)
    with contextlib.suppress(OSError):
        path.chmod(path.stat().st_mode & ~0o022)


def remove(folder: Path, keys: Shaped[np.ndarray, "*shape"]) -> None:
    """Removes the shards that hold a number of any of `keys`, where permitted."""
    wanted = keys.astype(np.bytes_).ravel()
    for path in _shards(folder):
        shard = _load(path, {})
        if shard is None or np.isin(shard[0], wanted).any():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _shards(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]


def _load(
    path: Path, made_by: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys, as bytes, and values of a shard; None if it cannot be used."""
    warn_if_others_write(path, holds=HOLDS)
    try:
        content = path.read_bytes()
        whole = _digest(content) == path.stem
        tensors = load(content) if whole else {}
        keys, values = tensors["keys"], tensors["values"]
        if (keys.dtype, values.dtype) != (np.uint8, np.float32):
            raise ValueError("other dtypes")
        if keys.ndim != 2 or not keys.shape[1] or values.shape != keys.shape[:1]:
            raise ValueError("other shapes")
        about = _about(content)
    except OSError as error:
        _log.warning("%s: cannot be read (%s)", path, error.strerror or error)
        return None
    except (SafetensorError, KeyError, TypeError, ValueError):
        _log.warning("%s: damaged; its scores will be computed again", path)
        with contextlib.suppress(OSError):  # the folder may be read-only
            path.unlink()
        return None
    if changed := sorted(x for x in made_by if about.get(x) != made_by[x]):
        _log.warning(
            "%s: not used, since its scores were computed with other %s",
            *(path, ", ".join(changed)),
        )
        return None
    return keys.view(f"S{keys.shape[1]}").ravel(), values


def _about(content: bytes) -> dict[str, str]:
    """The description in the header of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return dict(json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["about"]))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
