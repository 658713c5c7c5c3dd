"""The reference's scores: computed once before training, kept on disk beside the run.

A file is used again only if it was made from the same weights, the same tokens of every
pair and the same dtypes; otherwise it is made anew, always from the reference
model's own folder and never from weights that were trained.
"""

import dataclasses
import functools
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.data import Pairs, Plan
from jaxpref.errors import InputError
from jaxpref.files import cannot_write
from jaxpref.models import Model, ModelConfig
from jaxpref.models.hub import resolve_folder, weights_digest
from jaxpref.models.huggingface import load_config, load_params
from jaxpref.train.config import TrainConfig
from jaxpref.train.inputs import check_finite


def make_tables(
    config: TrainConfig,
    plan: Plan,
    out: Path,
    model: Model,
    params,
    score: Callable[..., dict[str, np.ndarray]],
    digest: str,
) -> dict[str, dict[str, np.ndarray]]:
    """What the objective reads of the reference, for the `train` and `heldout` pairs.

    Args:
      config: of the run.
      plan: its pairs.
      out: its folder; tables lie in `reference/`.
      model: the model; a reference has the same sizes.
      params: parameters of `config.model` before training, or None where the run is
        resumed: then they are read again if a table must be made.
      score: `score(params, pairs, title=...)`.
      digest: from `reference_digest`.

    Returns:
      Float32 [N, K] by name, for each set; nothing where the loss reads no reference
      or keeps its weights.

    Raises:
      InputError: if the reference is another kind of model, or gives log-probs that are
        not finite.
    """
    sets = {
        "train": (plan.train, config.sources),
        "heldout": (plan.heldout, config.heldout_sources),
    }
    names = config.objective.stored
    if not names:
        return {name: {} for name in sets}
    if config.reference is not None:
        params = None
    tables = {}
    for name, (pairs, sources) in sets.items():
        path = out / "reference" / f"{name}.npz"
        shape = (len(pairs), pairs.num_sides)
        blank = {key: np.zeros(shape, np.float32) for key in sorted(names)}
        if not len(pairs):  # nothing is held out
            tables[name] = blank
            continue
        found = from_first_process(
            functools.partial(load_tables, path, names, pairs, digest), blank
        )
        if found is None:
            if params is None:
                params = load_reference(config, model)
            title = f"reference log-probs ({name})"
            scores = score(params, pairs, title=title)
            # The policy's own kernels: at the start both agree, to the bit where a pair
            # has a row to itself, to rounding in packed rows.
            found = {key: scores[key.replace("reference", "policy")] for key in names}
            for table in found.values():
                check_finite(sources, pairs, config.reference or config.model, table)
            if jax.process_index() == 0:
                save_tables(path, found, pairs, digest)
        tables[name] = found
    return tables


def load_reference(config: TrainConfig, model: Model):
    """The reference's parameters, always from its own folder.

    Raises:
      InputError: if the reference is another kind of model.
    """
    folder = resolve_folder(config.reference or config.model)
    if _sizes(load_config(folder)) != _sizes(model.config):
        raise InputError(
            f"{config.reference}: its config.json describes another model than "
            f"{config.model}; a reference has the same sizes"
        )
    return load_params(folder, model)


def _sizes(config: ModelConfig) -> ModelConfig:
    """A config without what a run may choose: how it is computed."""
    return dataclasses.replace(
        config, param_dtype="float32", compute_dtype="float32", remat="none", unroll=1
    )


def reference_digest(config: TrainConfig) -> str:
    """SHA-256 of the reference's config and weights, and of the dtypes they run in.

    Empty where the loss reads no reference, and in all processes but the first, which
    alone reads and writes tables and compares.
    """
    if not config.objective.needs_reference or jax.process_index() != 0:
        return ""
    folder = resolve_folder(config.reference or config.model)
    return weights_digest(folder, f"{config.param_dtype} {config.compute_dtype}")


def save_tables(
    path: Path, tables: dict[str, np.ndarray], pairs: Pairs, digest: str
) -> None:
    """Writes tables `[N, K]` by pair id and content digest, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                **tables,
                ids=pairs.ids,
                contents=np.asarray(pairs.digest()),
                weights=np.asarray(digest),
            )
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def load_tables(
    path: Path, names: Iterable[str], pairs: Pairs, digest: str
) -> dict[str, np.ndarray] | None:
    """The stored tables in the order of `pairs`; None unless they are these."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            tables, ids = {name: stored[name] for name in names}, stored["ids"]
            contents, weights = str(stored["contents"]), str(stored["weights"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # damaged: made anew
    same = (
        weights == digest
        and np.array_equal(ids, pairs.ids)
        and contents == pairs.digest()
        and all(np.isfinite(table).all() for table in tables.values())
    )
    return tables if same else None


def from_first_process(
    load: Callable[[], dict[str, np.ndarray] | None], blank: dict[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """What process 0 finds on its disk, on every process."""
    tables = load() if jax.process_index() == 0 else None
    if jax.process_count() == 1:
        return tables
    found = multihost_utils.broadcast_one_to_all(np.asarray(tables is not None))
    if not found:
        return None
    return jax.device_get(multihost_utils.broadcast_one_to_all(tables or blank))
