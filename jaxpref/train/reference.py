"""Reference log-probs: computed once before training, kept on disk beside the run.

A file is used again only if it was made from the same weights, the same tokens of every
pair and the same compute dtype; otherwise it is made anew, always from the reference
model's own folder and never from weights that were trained.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from jaxpref.data import Pairs


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            logps=table,
            ids=pairs.ids,
            contents=np.asarray(pairs.digest()),
            weights=np.asarray(digest),
        )
    os.replace(temporary, path)


def load_table(path: Path, pairs: Pairs, digest: str) -> np.ndarray | None:
    """The stored log-probs in the order of `pairs`; None if they are not exactly these."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            logps, ids = stored["logps"], stored["ids"]
            contents, weights = str(stored["contents"]), str(stored["weights"])
    except (OSError, ValueError, KeyError):
        return None  # torn by a crash: made anew
    same = (
        weights == digest
        and np.array_equal(ids, pairs.ids)
        and contents == pairs.digest()
        and np.isfinite(logps).all()
    )
    return logps if same else None
