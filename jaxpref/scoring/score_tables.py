"""Scores of a fixed model, computed once per completion for all commands of a user.

They are cached by content, one number per completion, in a folder that all commands
share (`jaxpref.runtime.cache_folder`).  There is a separate cache for everything else
that affects a score: the model's weights and dtypes, the software, and the layout of
the batches, which affects rounding.  Runs with other losses, flips or seeds therefore
reuse the reference's scores of earlier runs, and always read what the policy's own
kernels would compute.

Each run has a copy in `OUT/reference`, which is read first.  The run can thus resume
with the same bits after the cache is deleted, or on another machine.  Missing or
damaged scores are computed again, always from the model's folder and never from
weights that are being trained.

A run checks stored scores before it uses them.  A new run computes a sample of them
again.  A resumed run compares a digest of all of them with that in its checkpoint.  If
they differ, all are computed again.
"""

import dataclasses
import functools
import hashlib
import json
import logging
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
from jaxpref.runtime.cache_folder import cache_folder
from jaxpref.runtime.processes import broadcast_from_process_zero, log
from jaxpref.scoring import score_cache
from jaxpref.scoring.checks import check_finite
from jaxpref.scoring.hidden_sums import CHES
from jaxpref.scoring.made_by import WEIGHTS, made_by
from jaxpref.scoring.score_dataset import ScoreDataset, progress_bar
from jaxpref.scoring.scores import policy_name

SHARD = 512
"""Pairs between two writes, rounded up to whole batches; a kill loses at most these."""
CHECKED = 4
"""Stored scores that a new run recomputes, per `SHARD` of them."""
TOLERANCE = {True: (1e-4, 1e-3), False: (5e-3, 0.1)}
"""How far a stored score may be from the same score computed again: relative to it, and
in nats.  True for float32 on CPU, False where products are rounded to fewer bits."""
_log = logging.getLogger("jaxpref")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedModel:
    """A model whose weights do not change between the records that it scores."""

    name: str
    """The name as the user gave it, for messages."""
    title: str = "reference log-probs"
    """What it gives, for progress bars and messages."""
    scores: tuple[str, ...]
    """The scores to compute, of the reference by the reference's names."""
    numerics: str = ""
    """What else affects rounding, besides dtypes and layout, as text."""
    digest: str
    """Digest of its weights and dtypes, from `model_digest`; empty on all processes
    except the first."""
    compute_dtype: str = "float32"
    """Dtype of its matrix products."""


@dataclasses.dataclass(frozen=True)
class ScoredSet:
    """A dataset whose completions the model scores."""

    name: str
    """What it is, for messages: "train", "heldout", or the name of a file."""
    dataset: PreferenceDataset
    """N records."""
    sources: tuple[str, ...]
    """The files of the records, for messages."""
    needed: np.ndarray
    """int [M]; the records whose scores are needed, in order."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A folder of stored scores."""

    folder: Path
    """The folder of the shards."""
    needed: bool
    """Whether it must be written; the cache need not be."""
    made_by: Mapping[str, str]
    """What its shards must say about themselves."""


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Computes the model's scores of some records of a dataset."""

    model: FixedModel
    scored: ScoredSet
    load: Callable
    score: ScoreDataset
    batch_size: int

    @property
    def title(self) -> str:
        return f"{self.model.title} ({self.scored.name})"

    def __call__(
        self, records: np.ndarray, *, title: str, bar: tqdm | None = None
    ) -> np.ndarray:
        """Float32 [names, M, K] of `records`, int [M].

        Computed with the policy's kernels, so both agree at the start: bit for bit
        with one pair per row, and up to rounding in packed rows.
        """
        chosen = self.scored.dataset.take(records)
        scores = self.score(self.load(), {}, chosen, title=title, bar=bar)
        names = self.model.scores
        computed = np.stack([scores[policy_name(name)] for name in names])
        for table in computed:
            check_finite(self.scored.sources, chosen, self.model.name, table)
        return computed


def score_tables(
    model: FixedModel,
    sets: Sequence[ScoredSet],
    *,
    load: Callable,
    score: ScoreDataset,
    batch_size: int,
    layout: str,
    out: Path | None = None,
    expected: Mapping[str, Any] | None = types.MappingProxyType({}),
) -> tuple[dict[str, dict[str, Float[np.ndarray, "N K"]]], dict[str, Any]]:
    """The scores of a fixed model, for each dataset.

    Args:
      model: the model.
      sets: the datasets.
      load: loads the model's parameters; called only if something must be scored.
      score: `score(params, {}, dataset, title=..., bar=...)`.
      batch_size: records that are scored together.
      layout: batch sizes, mesh and anything else that affects rounding, as text.
      out: the folder of a run, which keeps a copy of the scores in `reference/`; None
        for scores in the cache alone.
      expected: the digests that the run had before it was interrupted; empty for a new
        run, which computes a sample of the stored scores again; None to use them
        unchecked.

    Returns:
      Float32 [N, K] by name, for each dataset: NaN for records that are not needed.
      Empty if the model has no scores.  Also digests of the scores, for `expected`.

    Raises:
      InputError: if a score is not finite, or OUT cannot be written.
    """
    names = model.scores
    if not names:
        return {scored.name: {} for scored in sets}, {}
    folders, about = [], {}
    if jax.process_index() == 0:
        about = made_by(model.digest, f"{layout}, {model.numerics}")
        folders = _folders(model, about, out)
    load = functools.cache(load)
    tables, digests = {}, {}
    for scored in sets:
        scorer = _Scorer(model, scored, load, score, batch_size)
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
            values = _stored_or(values, _of_process_zero(find, keys.shape), keys)
        why = ""
        if expected is not None and len(known):
            why = _why_wrong(scorer, values, known, expected)
        if why:
            if jax.process_index() == 0:
                says = "%s: stored scores %s; all are computed again"
                _log.warning(says, scorer.title, why)
            for stored in folders:
                score_cache.remove(stored.folder, keys)
            blank = np.full(keys.shape, np.nan, np.float32)
            fill(blank, unscored(scored, keys, blank))
            values = _stored_or(blank, _of_process_zero(find, keys.shape), keys)
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
    """The keys of scores in the cache: str [len(names), N, K].

    A key depends on the tokens of prompt and completion, for a prefix on where it ends,
    and for a score of the pair on its other completion.  It does not depend on the
    side, so a flipped copy of a pair has the same keys.
    """
    own = dataset.completion_keys()
    ends = dataset.target_lengths.min(axis=1, keepdims=True).astype(np.str_)
    others = own[:, ::-1]

    def of(name: str) -> np.ndarray:
        if name in CHES:
            return np.strings.add(np.strings.add(own, f".{name}."), others)
        return (
            np.strings.add(np.strings.add(own, "."), ends) if "prefix" in name else own
        )

    return np.array([of(x) for x in names], np.str_).reshape(len(names), *own.shape)


def _folders(
    model: FixedModel, about: Mapping[str, str], out: Path | None
) -> list[Stored]:
    """Where the scores are read and written: the run's own copy first."""
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    cache = Stored(cache_folder() / "reference" / key, False, about)
    if out is None:
        return [cache]
    own = out / "reference" / model.digest[:32]
    return [Stored(own, True, {WEIGHTS: model.digest}), cache]


def _fill(
    scorer: _Scorer,
    folders: Sequence[Stored],
    keys: np.ndarray,
    about: Mapping[str, str],
    values: np.ndarray,
    missing: np.ndarray,
) -> None:
    """Computes and stores what `values` lacks of the records `missing`, and adds it."""
    size = -(-SHARD // scorer.batch_size) * scorer.batch_size
    with progress_bar(len(missing), scorer.title) as bar:
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            computed = scorer(part, title=scorer.title, bar=bar)
            new = np.isnan(values[:, part])
            _store(folders, keys[:, part][new], computed[new], about)
            values[:, part] = np.where(new, computed, values[:, part])


def _stored_or(
    computed: np.ndarray, stored: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """The stored scores; those that could not be stored, as they were computed."""
    if not np.isnan(stored).any():
        return stored
    values = np.where(np.isnan(stored), computed, stored)
    _, place = np.unique(keys, return_inverse=True)
    known = np.flatnonzero(np.isfinite(values))
    by_key = np.full(place.max() + 1, np.nan, np.float32)
    by_key[place.ravel()[known]] = values.ravel()[known]
    return np.where(np.isnan(values), by_key[place].reshape(keys.shape), values)


def _why_wrong(
    scorer: _Scorer,
    values: np.ndarray,
    known: np.ndarray,
    expected: Mapping[str, Any],
) -> str:
    """Why stored scores are not the model's; empty if they are.

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
    exact = scorer.model.compute_dtype != "bfloat16"
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
    for stored in folders:
        lacking = np.isnan(values)
        values[lacking] = score_cache.read(stored.folder, keys[lacking], stored.made_by)
        new = lacking & np.isfinite(values)
        if not stored.needed and new.any():
            _store([x for x in folders if x.needed], keys[new], values[new], about)
    return values


def _store(
    folders: Sequence[Stored],
    keys: np.ndarray,
    values: np.ndarray,
    about: Mapping[str, str],
) -> None:
    """Writes scores to OUT, which must succeed, and to the cache, which may fail."""
    for stored in folders:
        try:
            score_cache.append(stored.folder, keys, values, about)
        except InputError as error:
            if stored.needed:
                raise
            _log.warning("%s: later runs will compute these scores again", error)


def _of_process_zero(
    find: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """What process 0 reads from its disks, float32 of `shape`, on every process."""
    first = jax.process_index() == 0
    return broadcast_from_process_zero(find() if first else np.zeros(shape, np.float32))
