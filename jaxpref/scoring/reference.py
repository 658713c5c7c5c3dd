"""The reference's scores, computed once per completion for all runs of a user.

They are cached by content, one number per completion, in a folder that all runs share
(`jaxpref.files.cache_folder`).  There is a separate cache for everything else that
affects a score: the reference's weights and dtypes, the software, and the layout of the
batches, which affects rounding.  Runs with other losses, flips or seeds therefore reuse
the scores of earlier runs, and always read what the policy's own kernels would compute.

Each run has a copy in `OUT/reference`, which is read first.  The run can thus resume
with the same bits after the cache is deleted, or on another machine.  Missing or
damaged scores are computed again, always from the reference model's folder and never
from trained weights.
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
from jaxtyping import Float, Int, Shaped

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
"""Pairs between two writes, rounded up to whole batches; a kill loses at most these."""
SCORED_BY = (
    "data/**/*.py",
    "losses/_sequence.py",
    "models/**/*.py",
    "scoring/micro_batches.py",
    "scoring/score_dataset.py",
    "scoring/scorer.py",
    "scoring/scores.py",
    "sharding.py",
)
"""The code that a score depends on; a change of it invalidates cached scores."""

_log = logging.getLogger("jaxpref")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model of a run."""

    name: str
    """The name as the user gave it, for messages."""
    folder: Path
    """Its Hugging Face folder."""
    scores: tuple[str, ...]
    """Scores computed before training; none if its weights stay in memory."""
    numerics: str
    """What else affects rounding, besides dtypes and layout, as text."""
    digest: str
    """Digest of its weights and dtypes, from `reference_digest`; empty on all processes
    except the first."""


@dataclasses.dataclass(frozen=True)
class ScoredSet:
    """A dataset whose completions the reference scores."""

    name: str
    """"train" or "heldout"."""
    dataset: PreferenceDataset
    """N records."""
    sources: tuple[str, ...]
    """The files of the records, for messages."""
    needed: np.ndarray
    """int [M]; the records that the run sees, in order."""


def reference_digest(folder: Path, dtypes: str) -> str:
    """SHA-256 of a reference's config, weights and dtypes.

    Empty on all processes except the first, the only one that reads and writes scores.
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
) -> dict[str, dict[str, Float[np.ndarray, "N K"]]]:
    """The reference's scores that the objective reads, for each dataset.

    Args:
      reference: the reference.
      sets: the datasets.
      out: the run's folder; its copy of the scores is in `reference/`.
      load: loads the reference's parameters; called only if something must be scored.
      score: `score(params, None, dataset, title=..., bar=...)`.
      batch_size: pairs that are scored together.
      layout: batch sizes, mesh and anything else that affects rounding, as text.

    Returns:
      Float32 [N, K] by name, for each dataset: NaN for records that are not needed.
      Empty if no scores are stored.

    Raises:
      InputError: if a score is not finite, or OUT cannot be written.
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
            log(f"{title}: {known} cached, {len(missing)} to compute")
        with progress_bar(len(missing), title) as bar:
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                chosen = scored.dataset.take(part)
                scores = score(load(), None, chosen, title=title, bar=bar)
                # Computed with the policy's kernels, so both agree at the start, to the
                # bit with one pair per row, and up to rounding in packed rows.
                computed = np.stack([scores[policy_name(name)] for name in names])
                for table in computed:
                    check_finite(scored.sources, chosen, reference.name, table)
                new = np.isnan(values[:, part])
                _store(folders, keys[:, part][new], computed[new], about)
        if len(missing):
            # Read back as a resumed run would, so duplicate completions share a score.
            values = _of_process_zero(find, keys.shape)
        tables[scored.name] = dict(zip(names, values))
    return tables


def unscored(
    scored: ScoredSet,
    keys: Shaped[np.ndarray, "names N K"],
    values: Float[np.ndarray, "names N K"],
) -> Int[np.ndarray, " M"]:
    """The needed records that have an unscored completion, int [M], in order.

    Records whose completions all occur in earlier records are left out.
    """
    missing, seen = [], set()
    for record in dict.fromkeys(scored.needed.tolist()):
        wanted = set(keys[:, record][np.isnan(values[:, record])].ravel().tolist())
        if wanted - seen:
            missing.append(record)
            seen |= wanted
    return np.array(missing, np.int64)


def score_keys(
    dataset: PreferenceDataset, names: Sequence[str]
) -> Shaped[np.ndarray, "names N K"]:
    """The keys of the reference's scores in the cache: str [len(names), N, K].

    A key depends on the tokens of prompt and completion, and for a prefix on where it
    ends.  It does not depend on the side or on the other completion, so a flipped copy
    of a pair has the same keys.
    """
    of_completion = dataset.completion_keys()
    ends = dataset.completion_lengths.min(axis=1, keepdims=True).astype(np.str_)
    of_prefix = np.char.add(np.char.add(of_completion, "."), ends)
    keys = [of_prefix if "prefix" in name else of_completion for name in names]
    return np.array(keys, np.str_).reshape(len(names), *of_completion.shape)


def _find(
    folders: Sequence[Path], keys: np.ndarray, about: Mapping[str, str]
) -> np.ndarray:
    """The known scores, NaN elsewhere; copies those in the cache to OUT."""
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
    """What process 0 reads from its disks, float32 of `shape`, on every process."""
    first = jax.process_index() == 0
    return broadcast_from_process_zero(find() if first else np.zeros(shape, np.float32))


def _about(digest: str, layout: str) -> dict[str, str]:
    """Everything except the tokens that is known to affect a score's bits."""
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
