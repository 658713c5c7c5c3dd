"""The reference's scores: of any completion computed once, for all runs of a user.

They lie by content, a number a completion, in the cache folder that all runs share
(`jaxpref.files.cache_folder`), apart for whatever else changes them: the reference's
weights, dtypes, the software, and the layout of the batches, in which rounding differs.
So runs with other losses, flips or seeds read what the first one computed; fewer pairs
as well, where the longest stay and none shares a row.  And nobody reads numbers that
the policy's own kernels would not have given.

A run keeps a copy in `OUT/reference`, which comes first: it resumes to the same bits
after the cache was deleted, and on a machine that never had it.  What is missing or
damaged is computed again, always from the reference model's own folder and never from
weights that were trained.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxpref.data import Pairs, Plan
from jaxpref.errors import InputError
from jaxpref.files import cache_folder
from jaxpref.models import Model
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder, weights_digest
from jaxpref.runtime.processes import broadcast_from_process_zero
from jaxpref.scoring import score_cache
from jaxpref.scoring.score_dataset import progress_bar
from jaxpref.train.config import TrainConfig
from jaxpref.train.inputs import check_finite

SHARD = 512
"""Pairs between two writes: what a killed run may lose, rounded up to whole batches."""
SCORED_BY = (
    "data/*.py",
    "losses/_sequence.py",
    "models/*.py",
    "scoring/score_dataset.py",
    "scoring/scores.py",
)
"""The code that makes a score; who changes a loss computes none again."""

_log = logging.getLogger("jaxpref")


def make_tables(
    config: TrainConfig,
    plan: Plan,
    out: Path,
    model: Model,
    params,
    score: Callable[..., dict[str, np.ndarray]],
    digest: str,
    layout: str,
) -> dict[str, dict[str, np.ndarray]]:
    """What the objective reads of the reference, for the `train` and `heldout` pairs.

    Args:
      config: of the run.
      plan: its pairs.
      out: its folder; its copy lies in `reference/`.
      model: the model; a reference has the same sizes.
      params: parameters of `config.model` before training, or None where the run is
        resumed: then they are read again if a pair must be scored.
      score: `score(params, pairs, title=..., bar=...)`.
      digest: from `reference_digest`.
      layout: sizes of the batches, mesh and whatever else decides how scores are
        rounded; as text.

    Returns:
      Float32 [N, K] by name, for each set; nothing where the loss reads no reference
      or keeps its weights.

    Raises:
      InputError: if the reference is another kind of model, or gives log-probs that are
        not finite; or if OUT cannot be written.
    """
    names = sorted(config.objective.stored)
    if not names:
        return {"train": {}, "heldout": {}}
    _checked_folder(config, model)  # whether its weights are needed or not
    if config.reference is not None:
        params = None
    folders, about = [], {}
    if jax.process_index() == 0:
        about = _about(digest, layout)
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        folders = [
            out / "reference" / digest[:32],
            cache_folder() / "reference" / name,
        ]
    tables = {}
    for name, pairs, sources in (
        ("train", plan.train, config.sources),
        ("heldout", plan.heldout, config.heldout_sources),
    ):
        keys = score_keys(pairs, names)
        find = functools.partial(_find, folders, keys, about)
        values = _of_process_zero(find, keys.shape)
        missing = np.flatnonzero(np.isnan(values).any(axis=(0, 2)))
        title = f"reference log-probs ({name})"
        if len(pairs) and jax.process_index() == 0:
            known = len(pairs) - len(missing)
            print(f"{title}: {known} known, {len(missing)} to compute", flush=True)
        if len(missing) and params is None:
            params = load_reference(config, model)
        size = -(-SHARD // config.batch_size) * config.batch_size
        with progress_bar(len(missing), title) as bar:
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                chosen = pairs.take(part)
                scores = score(params, chosen, title=title, bar=bar)
                # The policy's own kernels: at the start both agree, to the bit where a
                # pair has a row to itself, to rounding in packed rows.
                found = np.stack(
                    [scores[n.replace("reference", "policy")] for n in names]
                )
                for table in found:
                    scored = config.reference or config.model
                    check_finite(sources, chosen, scored, table)
                new = np.isnan(values[:, part])
                _keep(folders, keys[:, part][new], found[new], about)
        if len(missing):
            # As a resumed run will read them: of a completion that occurs twice, one.
            values = _of_process_zero(find, keys.shape)
        tables[name] = dict(zip(names, values))
    return tables


def score_keys(pairs: Pairs, names: Sequence[str]) -> np.ndarray:
    """What the reference's scores are kept by: str [len(names), N, K].

    The prompt's and the completion's tokens, and of a prefix where it ends.  Neither
    the side nor the rest of the pair, so a flipped copy has the same keys.
    """
    of_completion = pairs.completion_keys()
    ends = pairs.completion_lengths.min(axis=1, keepdims=True).astype(np.str_)
    of_prefix = np.char.add(np.char.add(of_completion, "."), ends)
    keys = [of_prefix if "prefix" in name else of_completion for name in names]
    return np.array(keys, np.str_).reshape(len(names), *of_completion.shape)


def _find(
    folders: Sequence[Path], keys: np.ndarray, about: Mapping[str, str]
) -> np.ndarray:
    """The scores that are known, NaN elsewhere; those of the cache copied to OUT."""
    values = np.full(keys.shape, np.nan, np.float32)
    for number, folder in enumerate(folders):
        lacking = np.isnan(values)
        values[lacking] = score_cache.read(folder, keys[lacking])
        new = lacking & np.isfinite(values)
        if number and new.any():
            _keep(folders[:1], keys[new], values[new], about)
    return values


def _keep(
    folders: Sequence[Path],
    keys: np.ndarray,
    values: np.ndarray,
    about: Mapping[str, str],
) -> None:
    """Writes scores to OUT, which must work, and to the cache, which may fail."""
    for number, folder in enumerate(folders):
        try:
            score_cache.append(folder, keys, values, about)
        except InputError as error:
            if not number:
                raise
            _log.warning("%s: later runs compute these scores again", error)


def _of_process_zero(
    find: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """What process 0 finds on its disks, float32 of `shape`, on every process."""
    first = jax.process_index() == 0
    return broadcast_from_process_zero(find() if first else np.zeros(shape, np.float32))


def _about(digest: str, layout: str) -> dict[str, str]:
    """Everything but the tokens that a score's bits depend on, as it is known."""
    device = jax.devices()[0]
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for pattern in SCORED_BY:
        for path in sorted(package.glob(pattern)):
            code.update(path.read_bytes())
    return {
        "weights and dtypes": digest,
        "layout": layout,
        "device": f"{device.platform} {device.device_kind}",
        "jax": f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}",
        "precision of products": str(jax.config.jax_default_matmul_precision),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "jaxpref": code.hexdigest(),
    }


def load_reference(config: TrainConfig, model: Model):
    """The reference's parameters, always from its own folder.

    Raises:
      InputError: if the reference is another kind of model.
    """
    return load_params(_checked_folder(config, model), model)


def _checked_folder(config: TrainConfig, model: Model) -> Path:
    folder = resolve_folder(config.reference or config.model)
    if read_architecture(folder) != model.architecture:
        raise InputError(
            f"{config.reference}: its config.json describes another model than "
            f"{config.model}; a reference has the same sizes"
        )
    return folder


def reference_digest(config: TrainConfig) -> str:
    """SHA-256 of the reference's config and weights, and of the dtypes they run in.

    Empty where the loss reads no reference, and in all processes but the first, which
    alone reads and writes scores and compares.
    """
    if not config.objective.needs_reference or jax.process_index() != 0:
        return ""
    folder = resolve_folder(config.reference or config.model)
    return weights_digest(folder, f"{config.param_dtype} {config.compute_dtype}")
