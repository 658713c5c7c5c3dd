"""The reference's scores, computed once per completion for all runs of a user.

They are cached by content, one number per completion, in a folder that all runs share
(`jaxpref.runtime.cache_folder`).  There is a separate cache for everything else that
affects a score: the reference's weights and dtypes, the software, and the layout of the
batches, which affects rounding.  Runs with other losses, flips or seeds therefore reuse
the scores of earlier runs, and always read what the policy's own kernels would compute.

Each run has a copy in `OUT/reference`, which is read first.  The run can thus resume
with the same bits after the cache is deleted, or on another machine.  Missing or
damaged scores are computed again, always from the reference model's folder and never
from trained weights.

Stored scores are checked before they are used.  A new run computes a sample of them
again.  A resumed run compares a digest of all of them with that in its checkpoint.  If
they differ, all are computed again.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from tqdm import tqdm

from jaxpref.data import PreferenceDataset
from jaxpref.errors import InputError
from jaxpref.models.hub import weights_digest
from jaxpref.models.weights import Weights
from jaxpref.runtime.cache_folder import cache_folder
from jaxpref.runtime.processes import broadcast_from_process_zero, log
from jaxpref.scoring import score_cache
from jaxpref.scoring.checks import check_finite
from jaxpref.scoring.score_dataset import ScoreDataset, progress_bar
from jaxpref.scoring.scores import policy_name

SHARD = 512
"""Pairs between two writes, rounded up to whole batches; a kill loses at most these."""
CHECKED = 4
"""Stored scores that a new run recomputes, per `SHARD` of them."""
TOLERANCE = {True: (1e-4, 1e-3), False: (5e-3, 0.1)}
"""How far a stored score may be from the same score computed again: relative to it, and
in nats.  True for float32 on CPU, False where products are rounded to fewer bits."""
SCORED_BY = (
    "data/**/*.py",
    "losses/_sequence.py",
    "models/**/*.py",
    "scoring/[dfht]*.py",
    "scoring/*scorer.py",
    "scoring/micro_batches.py",
    "scoring/score[_s]*.py",
    "sharding.py",
)
"""The code that a score depends on; a change of it invalidates cached scores."""

WEIGHTS = "weights and dtypes"
"""Name of the reference's digest in what shards say about themselves."""

_log = logging.getLogger("jaxpref")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model of a run."""

    name: str
    """The name as the user gave it, for messages."""
    weights: Weights
    """Where its parameters are, and how they are held."""
    scores: tuple[str, ...]
    """Scores computed before training; none if its weights stay in memory."""
    numerics: str
    """What else affects rounding, besides dtypes and layout, as text."""
    digest: str
    """Digest of its weights and dtypes, from `reference_digest`; empty on all processes
    except the first."""
    compute_dtype: str = "float32"
    """Dtype of its matrix products."""

    @property
    def folder(self) -> Path:
        """Its Hugging Face folder."""
        return self.weights.folder


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


@dataclasses.dataclass(frozen=True)
class Stored:
    """A folder of stored scores."""

    folder: Path
    """The folder of the shards."""
    made_by: Mapping[str, str]
    """What its shards must say about themselves."""


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Computes the reference's scores of some records of a dataset."""

    reference: Reference
    scored: ScoredSet
    load: Callable
    score: ScoreDataset
    batch_size: int

    @property
    def title(self) -> str:
        return f"reference log-probs ({self.scored.name})"

    def __call__(
        self, records: np.ndarray, *, title: str, bar: tqdm | None = None
    ) -> np.ndarray:
        """Float32 [names, M, K] of `records`, int [M].

        Computed with the policy's kernels, so both agree at the start: bit for bit
        with one pair per row, and up to rounding in packed rows.
        """
        chosen = self.scored.dataset.take(records)
        scores = self.score(self.load(), {}, chosen, title=title, bar=bar)
        names = self.reference.scores
        computed = np.stack([scores[policy_name(name)] for name in names])
        for table in computed:
            check_finite(self.scored.sources, chosen, self.reference.name, table)
        return computed


def reference_digest(weights: Weights, dtypes: str) -> str:
    """SHA-256 of a reference's config, weights, adapter or checkpoint, and dtypes.

    Empty on all processes except the first, the only one that reads and writes scores.
    """
    also = weights.quantization, weights.saved and weights.saved.digest
    dtypes = " ".join([dtypes, *filter(None, also)])
    of = weights.folder, dtypes, weights.adapter
    return weights_digest(*of) if jax.process_index() == 0 else ""


def reference_tables(
    reference: Reference,
    sets: Sequence[ScoredSet],
    out: Path,
    *,
    load: Callable,
    score: ScoreDataset,
    batch_size: int,
    layout: str,
    expected: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[dict[str, dict[str, Float[np.ndarray, "N K"]]], dict[str, Any]]:
    """The reference's scores that the objective reads, for each dataset.

    Args:
      reference: the reference.
      sets: the datasets.
      out: the run's folder; its copy of the scores is in `reference/`.
      load: loads the reference's parameters; called only if something must be scored.
      score: `score(params, {}, dataset, title=..., bar=...)`.
      batch_size: pairs that are scored together.
      layout: batch sizes, mesh and anything else that affects rounding, as text.
      expected: the digests that the run had before it was interrupted; empty for a new
        run.

    Returns:
      Float32 [N, K] by name, for each dataset: NaN for records that are not needed.
      Empty if no scores are stored.  Also digests of the scores, for `expected`.

    Raises:
      InputError: if a score is not finite, or OUT cannot be written.
    """
    names = reference.scores
    if not names:
        return {scored.name: {} for scored in sets}, {}
    folders, about = [], {}
    if jax.process_index() == 0:
        about = _about(reference.digest, f"{layout}, {reference.numerics}")
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        folders = [
            Stored(
                out / "reference" / reference.digest[:32], {WEIGHTS: reference.digest}
            ),
            Stored(cache_folder() / "reference" / key, about),
        ]
    load = functools.cache(load)
    tables, digests = {}, {}
    for scored in sets:
        scorer = _Scorer(reference, scored, load, score, batch_size)
        keys = score_keys(scored.dataset, names)
        find = functools.partial(_find, folders, keys, about)
        fill = functools.partial(_fill, scorer, folders, keys, about)
        values = _of_process_zero(find, keys.shape)
        missing = unscored(scored, keys, values)
        known = scored.needed[~np.isin(scored.needed, missing)]
        if len(scored.needed):
            cached = f"{len(known)} cached, {len(missing)} to compute"
            log(f"{scorer.title}: {cached}")
        if len(missing):
            fill(values, missing)
            # Read back as a resumed run would, so duplicate completions share a score.
            values = _of_process_zero(find, keys.shape)
        if len(known) and (why := _why_wrong(scorer, values, known, expected)):
            if jax.process_index() == 0:
                says = "%s: stored scores %s; all are computed again"
                _log.warning(says, scorer.title, why)
            for stored in folders:
                score_cache.remove(stored.folder, keys)
            blank = np.full(keys.shape, np.nan, np.float32)
            fill(blank, unscored(scored, keys, blank))
            values = _of_process_zero(find, keys.shape)
        tables[scored.name] = dict(zip(names, values))
        digests[scored.name] = scores_digest(values, scored.needed)
    return tables, digests


def scores_digest(
    values: Float[np.ndarray, "names N K"], records: Int[np.ndarray, " M"]
) -> dict[str, Any]:
    """The number of records, and the SHA-256 of their scores."""
    content = np.ascontiguousarray(values[:, records])
    return {
        "count": len(records),
        "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
    }


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
    ends = dataset.target_lengths.min(axis=1, keepdims=True).astype(np.str_)
    of_prefix = np.char.add(np.char.add(of_completion, "."), ends)
    keys = [of_prefix if "prefix" in name else of_completion for name in names]
    return np.array(keys, np.str_).reshape(len(names), *of_completion.shape)


def _fill(
    scorer: _Scorer,
    folders: Sequence[Stored],
    keys: np.ndarray,
    about: Mapping[str, str],
    values: np.ndarray,
    missing: np.ndarray,
) -> None:
    """Computes and stores what `values` lacks of the records `missing`."""
    size = -(-SHARD // scorer.batch_size) * scorer.batch_size
    with progress_bar(len(missing), scorer.title) as bar:
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            computed = scorer(part, title=scorer.title, bar=bar)
            new = np.isnan(values[:, part])
            _store(folders, keys[:, part][new], computed[new], about)


def _why_wrong(
    scorer: _Scorer,
    values: np.ndarray,
    known: np.ndarray,
    expected: Mapping[str, Any],
) -> str:
    """Why stored scores are not the reference's; empty if they are.

    Args:
      scorer: computes scores.
      values: float32 [names, N, K]; the scores of all records that are needed.
      known: int [M]; the records whose scores were stored.
      expected: digests by dataset, from the checkpoint; empty for a new run.
    """
    scored = scorer.scored
    was = expected.get(scored.name)
    if was is not None and was["count"] <= len(scored.needed):
        before = scored.needed[: was["count"]]
        if scores_digest(values, before) != was:
            return "differ from those in the checkpoint"
        # A run that was made longer reads others, which the checkpoint does not cover.
        known = known[~np.isin(known, before)]
        if not len(known):
            return ""
    count = max(scorer.batch_size, CHECKED * -(-len(known) // SHARD))
    count = min(len(known), count)
    # One record from each part, at a place that nobody can predict.
    place = broadcast_from_process_zero(np.random.default_rng().random(count))
    place = ((np.arange(count) + place) / count * len(known)).astype(int)
    part = known[np.minimum(place, len(known) - 1)]
    computed = scorer(part, title=f"checking {scorer.title}")
    exact = scorer.reference.compute_dtype != "bfloat16"
    rtol, atol = TOLERANCE[exact and jax.devices()[0].platform == "cpu"]
    stored = values[:, part]
    wrong = ~np.isclose(stored, computed, rtol, atol, equal_nan=True)
    if not wrong.any():
        return ""
    pairs = int(wrong.any(axis=(0, 2)).sum())
    most = np.nanmax(np.abs(stored - computed))
    return f"are wrong for {pairs} of {count} records, by up to {most:.3g} nats"


def _find(
    folders: Sequence[Stored], keys: np.ndarray, about: Mapping[str, str]
) -> np.ndarray:
    """The known scores, NaN elsewhere; copies those in the cache to OUT."""
    values = np.full(keys.shape, np.nan, np.float32)
    for number, stored in enumerate(folders):
        lacking = np.isnan(values)
        values[lacking] = score_cache.read(stored.folder, keys[lacking], stored.made_by)
        new = lacking & np.isfinite(values)
        if number and new.any():
            _store(folders[:1], keys[new], values[new], about)
    return values


def _store(
    folders: Sequence[Stored],
    keys: np.ndarray,
    values: np.ndarray,
    about: Mapping[str, str],
) -> None:
    """Writes scores to OUT, which must succeed, and to the cache, which may fail."""
    for number, stored in enumerate(folders):
        try:
            score_cache.append(stored.folder, keys, values, about)
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
        WEIGHTS: digest,
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
