"""The reference's scores: of any completion computed once, for all runs of a user.

They are stored by content, one number per completion, in the cache folder that all
runs share (`jaxpref.files.cache_folder`), separately for whatever else changes them:
the reference's weights, dtypes, the software, and the layout of the batches, on which
rounding depends.  So runs with other losses, flips or seeds read what the first one
computed, and nobody reads numbers that the policy's own kernels would not have given.

A run keeps a copy in `OUT/reference`, which is read first: it resumes to the same bits
after the cache was deleted, and on a machine that never had it.  What is missing or
damaged is computed again, always from the reference model's own folder and never from
weights that were trained.
"""

import dataclasses
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

from jaxpref.data import PreferenceDataset
from jaxpref.errors import InputError
from jaxpref.files import cache_folder
from jaxpref.models.hub import weights_digest
from jaxpref.runtime.processes import broadcast_from_process_zero, log
from jaxpref.scoring import score_cache
from jaxpref.scoring.checks import check_finite
from jaxpref.scoring.score_dataset import ScoreDataset, progress_bar
from jaxpref.scoring.scores import policy_name

SHARD = 512
"""Pairs between two writes: what a killed run may lose, rounded up to whole batches."""
SCORED_BY = (
    "data/*.py",
    "losses/_sequence.py",
    "models/*.py",
    "scoring/score_dataset.py",
    "scoring/scorer.py",
    "scoring/scores.py",
)
"""The code that computes a score: changing a loss invalidates none."""

_log = logging.getLogger("jaxpref")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model of a run."""

    name: str
    """As the user gave it, for messages."""
    folder: Path
    """Its Hugging Face folder."""
    scores: tuple[str, ...]
    """The scores that are computed before training; none where its weights stay."""
    numerics: str
    """What decides on rounding beside dtypes and layout, as text."""
    digest: str
    """Of its weights and dtypes, from `reference_digest`; empty on all processes but
    the first, and where the objective reads no reference."""


@dataclasses.dataclass(frozen=True)
class ScoredSet:
    """A dataset whose completions the reference scores."""

    name: str
    """"train" or "heldout"."""
    dataset: PreferenceDataset
    """N records."""
    sources: tuple[str, ...]
    """Where they come from, for messages."""
    needed: np.ndarray
    """int [M]; the records that the run reads, in the order in which it does."""


def reference_digest(folder: Path, dtypes: str) -> str:
    """SHA-256 of a reference's config and weights, and of the dtypes they run in.

    Empty on all processes but the first, which alone reads and writes scores and
    compares.
    """
    return weights_digest(folder, dtypes) if jax.process_index() == 0 else ""


def reference_tables(
    reference: Reference,
    sets: Sequence[ScoredSet],
    out: Path,
    *,
    load: Callable,
    score: ScoreDataset,
    batch_size: int,
    layout: str,
) -> dict[str, dict[str, np.ndarray]]:
    """What the objective reads of the reference, for each set.

    Args:
      reference: the reference.
      sets: the datasets.
      out: folder of the run; its copy is in `reference/`.
      load: makes the reference's parameters, where a completion must be scored.
      score: `score(params, None, dataset, title=..., bar=...)`.
      batch_size: pairs that are scored together.
      layout: sizes of the batches, mesh and whatever else decides how scores are
        rounded; as text.

    Returns:
      Float32 [N, K] by name, for each set: NaN for records that are not needed, and
      nothing where no score is stored.

    Raises:
      InputError: if the reference gives scores that are not finite, or OUT cannot be
        written.
    """
    names = reference.scores
    if not names:
        return {scored.name: {} for scored in sets}
    folders, about = [], {}
    if jax.process_index() == 0:
        about = _about(reference.digest, f"{layout}, {reference.numerics}")
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        folders = [
            out / "reference" / reference.digest[:32],
            cache_folder() / "reference" / key,
        ]
    load = functools.cache(load)
    size = -(-SHARD // batch_size) * batch_size
    tables = {}
    for scored in sets:
        keys = score_keys(scored.dataset, names)
        find = functools.partial(_find, folders, keys, about)
        values = _of_process_zero(find, keys.shape)
        missing = unscored(scored, keys, values)
        title = f"reference log-probs ({scored.name})"
        if len(scored.needed):
            known = len(scored.needed) - len(missing)
            log(f"{title}: {known} known, {len(missing)} to compute")
        with progress_bar(len(missing), title) as bar:
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                chosen = scored.dataset.take(part)
                scores = score(load(), None, chosen, title=title, bar=bar)
                # The policy's own kernels: at the start both agree, to the bit where a
                # pair has a row to itself, to rounding in packed rows.
                computed = np.stack([scores[policy_name(name)] for name in names])
                for table in computed:
                    check_finite(scored.sources, chosen, reference.name, table)
                new = np.isnan(values[:, part])
                _store(folders, keys[:, part][new], computed[new], about)
        if len(missing):
            # As a resumed run will read them: of a completion that occurs twice, one.
            values = _of_process_zero(find, keys.shape)
        tables[scored.name] = dict(zip(names, values))
    return tables


def unscored(scored: ScoredSet, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The needed records with a completion without a score, int [M'], in their order.

    A record whose completions all occur in records before it is left out.
    """
    missing, seen = [], set()
    for record in dict.fromkeys(scored.needed.tolist()):
        wanted = set(keys[:, record][np.isnan(values[:, record])].ravel().tolist())
        if wanted - seen:
            missing.append(record)
            seen |= wanted
    return np.array(missing, np.int64)


def score_keys(dataset: PreferenceDataset, names: Sequence[str]) -> np.ndarray:
    """What the reference's scores are stored by: str [len(names), N, K].

    The prompt's and the completion's tokens, and of a prefix where it ends.  Neither
    the side nor the rest of the pair, so a flipped copy has the same keys.
    """
    of_completion = dataset.completion_keys()
    ends = dataset.completion_lengths.min(axis=1, keepdims=True).astype(np.str_)
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
            _store(folders[:1], keys[new], values[new], about)
    return values


def _store(
    folders: Sequence[Path],
    keys: np.ndarray,
    values: np.ndarray,
    about: Mapping[str, str],
) -> None:
    """Writes scores to OUT, which must succeed, and to the cache, which may fail."""
    for number, folder in enumerate(folders):
        try:
            score_cache.append(folder, keys, values, about)
        except InputError as error:
            if not number:
                raise
            _log.warning("%s: later runs will compute these scores again", error)


def _of_process_zero(
    find: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """What process 0 finds on its disks, float32 of `shape`, on every process."""
    first = jax.process_index() == 0
    return broadcast_from_process_zero(find() if first else np.zeros(shape, np.float32))


def _about(digest: str, layout: str) -> dict[str, str]:
    """Everything but the tokens that is known to decide on a score's bits."""
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
        # jax declares its options at run time.
        "precision of products": str(
            jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        ),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "jaxpref": code.hexdigest(),
    }
