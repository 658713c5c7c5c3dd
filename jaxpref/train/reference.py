"""Reference log-probs: computed once before training, kept on disk beside the run.

A file is used again only if it was made from the same weights, the same tokens of every
pair and the same compute dtype; otherwise it is made anew, always from the reference
model's own folder and never from weights that were trained.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.data import Pairs
from jaxpref.train.checkpoint import cannot_write


def weights_digest(folder: Path, compute_dtype: str) -> str:
    """SHA-256 of a model folder's config and weights, and of the dtype they run in."""
    digest = hashlib.sha256(compute_dtype.encode())
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def save_table(path: Path, table: np.ndarray, pairs: Pairs, digest: str) -> None:
    """Writes log-probs `[N, K]` by pair id and content digest, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                logps=table,
                ids=pairs.ids,
                contents=np.asarray(pairs.digest()),
                weights=np.asarray(digest),
            )
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def load_table(path: Path, pairs: Pairs, digest: str) -> np.ndarray | None:
    """The stored log-probs in the order of `pairs`; None unless they are these."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            logps, ids = stored["logps"], stored["ids"]
            contents, weights = str(stored["contents"]), str(stored["weights"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # damaged: made anew
    same = (
        weights == digest
        and np.array_equal(ids, pairs.ids)
        and contents == pairs.digest()
        and np.isfinite(logps).all()
    )
    return logps if same else None


def from_first_process(
    load: Callable[[], np.ndarray | None], shape: tuple[int, int]
) -> np.ndarray | None:
    """What process 0 finds on its disk, on every process."""
    table = load() if jax.process_index() == 0 else None
    if jax.process_count() == 1:
        return table
    found = multihost_utils.broadcast_one_to_all(np.asarray(table is not None))
    if not found:
        return None
    blank = np.zeros(shape, np.float32) if table is None else table
    return np.asarray(multihost_utils.broadcast_one_to_all(blank))
