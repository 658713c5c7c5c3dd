"""`jaxpref audit`: finds probably wrong labels and unreliable annotators.

Every pair is judged by models that were not trained on it or its prompt: Bradley-Terry
models on lengths, surface features, words, and a language model's frozen features,
cross-fitted by prompt and stacked.  The margins are calibrated jointly with the flip
rate, or by verified labels.  EM then estimates the reliability of each annotator and
the probability that each label is right.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset
from jaxpref.data.shared_prompts import grouped_keys
from jaxpref.errors import InputError
from jaxpref.evaluate import audit_summary
from jaxpref.evaluate import features as feature_store
from jaxpref.evaluate.audit_config import AuditConfig as AuditConfig
from jaxpref.evaluate.audit_records import (
    RenamedSource,
    cleaned,
    example_at,
    named_annotators,
    source_names,
    texts_of,
)
from jaxpref.evaluate.baselines import rankings
from jaxpref.evaluate.estimate import (
    Estimate,
    estimate,
    estimate_calibrated,
)
from jaxpref.evaluate.features import Features
from jaxpref.evaluate.flips import agreement_bins
from jaxpref.evaluate.judges import Judgment, Part, judge
from jaxpref.evaluate.preferences import Labels, preferences, preferences_csv
from jaxpref.evaluate.recurring import with_strengths
from jaxpref.evaluate.review import advice, review_csv, worth_a_look
from jaxpref.evaluate.verdicts import (
    check_unsaved,
    probabilities,
    read_verdicts,
    settle,
)
from jaxpref.evaluate.votes import Votes, verified, votes_of
from jaxpref.files import AUDIT, AUDIT_FILES, write_json, write_whole
from jaxpref.models import Numerics, build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder, weights_digest
from jaxpref.runtime.mesh import check_rows, make_mesh, rows_for
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import log
from jaxpref.runtime.run_folder import check_config, open_out
from jaxpref.scoring.checks import check_fits

CONFIG = "audit_config.json"
"""Name of the file with the config of an audit."""
REVIEW = "review.csv"
"""Name of the review list."""
MAY_CHANGE = (
    *("out", "features", "batch_size", "mesh", "source_field", "confounders"),
    *("action", "threshold", "action_top", "top", "budget", "apply", "power"),
)
"""Settings that may change when an audit is repeated with the same OUT."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """The results of an audit, as plain records."""

    summary: dict[str, Any]
    """The contents of `summary.json`."""
    pairs: list[dict[str, Any]]
    """The contents of `audit.jsonl`."""
    suspects: list[dict[str, Any]]
    """The `top` most suspicious pairs with their texts: `prompt`, `chosen`,
    `rejected`."""
    calibration: list[dict[str, float]]
    """Bins with equal counts: `pairs`, mean `confidence` of the model, share of labels
    that agree with it, and its interval."""
    preferences: list[dict[str, Any]]
    """The contents of `preferences.csv`."""
    scores: dict[str, np.ndarray]
    """float64 [N] by name of a judge or a baseline; lower for labels that it finds more
    probably wrong."""


@dataclasses.dataclass(frozen=True)
class _Opened:
    """An opened preference file, with the pairs that can be judged."""

    source: RenamedSource
    pairs: PreferenceDataset
    report: dict[str, int]
    """Counts of rows read and dropped."""


def run(config: AuditConfig) -> Audit:
    """Audits a file and writes all of OUT except the report page."""
    reads = {
        "--data": config.data,
        "--model": config.model,
        "--trusted": config.trusted,
        "--apply": None if applies_own(config) else config.apply,
    }
    opened = open_out(config.out, CONFIG, what=AUDIT, writes=AUDIT_FILES, reads=reads)
    with opened as out:
        return _run(config, out)


def _run(config: AuditConfig, out: Path) -> Audit:
    if jax.process_count() > 1:
        raise InputError("an audit runs in a single process; start it on one machine")
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    folder = resolve_folder(config.model)
    opened = _open(config.data, config, folder, config.annotator_field)
    trusted = _open(config.trusted, config, folder, None) if config.trusted else None
    pairs = opened.pairs
    if config.action_top is not None and config.action_top >= len(pairs):
        raise InputError(
            f"--action-top {config.action_top}: must be below the {len(pairs)} pairs "
            "that can be judged"
        )
    if not applies_own(config):
        check_unsaved(out / REVIEW)
    asked = _checked_config(config, pairs, trusted, out)
    votes = votes_of(pairs)
    said = _said(config, pairs, votes, trusted)
    part = _part(config.data, opened, config, folder)
    known = None
    if trusted is not None:
        known = _part(str(config.trusted), trusted, config, folder)
    log(f"judging {len(pairs)} pairs in {config.folds} folds")
    found = judge(part, known, folds=config.folds, seed=config.seed)
    before = _estimate(config, found, votes)
    judged = dataclasses.replace(
        before, posterior=probabilities(before.posterior, said)
    )
    order = np.lexsort((found.margins, judged.posterior))
    rows = audit_summary.rows_of(judged, found, votes, said, pairs, order, config)
    preferred = preferences(
        Labels(
            found.surface,
            part.keys,
            votes.annotator_names,
            source_names(opened.source, pairs.columns["row"], config.source_field),
        ),
        _own_ranking(part.found),
        confounders=config.held_fixed,
    )
    unsaid = order[said[order] == ""]  # a verdict settles a label
    looks = unsaid[: config.top]
    summary = audit_summary.summarize(judged, found, votes, part.keys, opened.report)
    summary |= audit_summary.acted(judged, rows, config)
    summary["confounders"] = config.held_fixed
    summary["advice"] = advice(summary)
    flips = pairs.columns["is_flipped"]
    # Known flips measure the ranking that the labels alone give, without verdicts.
    beside = rankings(part.answers, found.folds)
    summary |= audit_summary.compared(found, before.posterior, beside, flips)
    if (said != "").any():
        summary["verdicts"] = audit_summary.checked(said, before.posterior)
    if config.power is not None:
        summary["power"] = audit_summary.power(judged, votes, config.power)
    if config.budget is not None:
        gain = np.array([row["gain"] for row in rows])
        looks = worth_a_look(gain, unsaid, votes.texts, budget=config.budget)
        summary["budget"] = audit_summary.worth(
            looks, judged.posterior, gain, votes.texts
        )
    write_json(out / CONFIG, asked)  # from now on, OUT belongs to this audit
    listed = lambda some: [rows[n] | _texts(opened, n) for n in some]
    suspects = listed(unsaid[: config.top])
    write_whole(out / "audit.jsonl", _lines(rows))
    write_whole(out / "clean.jsonl", _lines(cleaned(opened.source, rows)))
    if not applies_own(config):
        write_whole(out / REVIEW, review_csv(listed(looks)))
    write_whole(out / "preferences.csv", preferences_csv(preferred))
    write_json(out / "summary.json", summary)
    bins = agreement_bins(judged.margins)
    scores = {name: ranking.scores for name, ranking in beside.items()}
    scores = {**found.alone, **scores}
    return Audit(summary, rows, suspects, bins, preferred, scores)


def applies_own(config: AuditConfig) -> bool:
    """Whether the verdicts to apply are in OUT/review.csv, which then stays."""
    if config.apply is None:
        return False
    return Path(config.apply).resolve() == (Path(config.out) / REVIEW).resolve()


def _open(
    name: str, config: AuditConfig, folder: Path, annotator_field: str | None
) -> _Opened:
    """Reads and tokenizes a preference file."""
    source = named_annotators(
        data.open_source(name), annotator_field, config.ignore_fields
    )
    options = DataOptions(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        heldout_fraction=0.0,
        # An audit expects malformed records; those that cannot be judged are counted.
        drop_empty=True,
    )
    positions = read_architecture(folder).max_position_embeddings
    options = data.for_model(options, positions)
    plan = data.make_splits(source, data.load_tokenizer(folder), options, sides=2)
    pairs = plan.train
    rows, first = np.unique(pairs.columns["row"], return_index=True)
    if len(rows) < len(pairs):
        twice = np.setdiff1d(np.arange(len(pairs)), first)[0]
        raise InputError(
            f"{name} row {pairs.columns['row'][twice] + 1}: has several traces "
            "per answer; an audit judges each record once, so keep only one trace"
        )
    plan.fields.read_too(config.source_field)
    for line in (plan.describe(), plan.fields.describe()):
        log(f"{name}: {line}")
    return _Opened(source, pairs, plan.report)


def _part(name: str, opened: _Opened, config: AuditConfig, folder: Path) -> Part:
    """The features and texts of pairs."""
    pairs = opened.pairs
    cache = Path(config.features or Path(config.out) / "features")
    found = _features(name, config, folder, pairs, cache)
    examples = [example_at(opened.source, int(row)) for row in pairs.columns["row"]]
    texts = [texts_of(example) for example in examples]
    return Part(
        found,
        [text["prompt"] for text in texts],
        [(text["chosen"], text["rejected"]) for text in texts],
        grouped_keys(example.prompt for example in examples),
    )


def _texts(opened: _Opened, n: int) -> dict[str, str]:
    """`prompt`, `chosen` and `rejected` of pair n."""
    return texts_of(example_at(opened.source, int(opened.pairs.columns["row"][n])))


def _said(
    config: AuditConfig, pairs: PreferenceDataset, votes: Votes, trusted: _Opened | None
) -> np.ndarray:
    """The verdict on each label: a person's, or else that of the verified labels."""
    said = np.full(len(pairs), "", "<U5")
    if trusted is not None:
        said = verified(pairs, trusted.pairs, str(config.trusted))
    if config.apply is None:
        return said
    by_person = settle(
        read_verdicts(config.apply),
        config.apply,
        rows=pairs.columns["row"] + 1,
        ids=pairs.ids,
        texts=votes.texts,
        orientation=votes.orientation,
    )
    return np.where(by_person == "", said, by_person)


def _estimate(config: AuditConfig, found: Judgment, votes: Votes) -> Estimate:
    fit = estimate if found.trusted is None else estimate_calibrated
    judged = fit(
        found.margins,
        votes.annotators,
        items=votes.items,
        orientation=votes.orientation,
        num_annotators=len(votes.names),
        assumed_flip_rate=config.assumed_flip_rate,
    )
    if found.trusted is not None:
        return judged
    return with_strengths(judged, votes, assumed_flip_rate=config.assumed_flip_rate)


def _own_ranking(found: Features) -> np.ndarray:
    """The model's log-prob per token: preferred minus other answer."""
    each = found.logps.astype(np.float64) / found.lengths
    return each[:, 0] - each[:, 1]


def _checked_config(
    config: AuditConfig,
    pairs: PreferenceDataset,
    trusted: _Opened | None,
    out: Path,
) -> dict[str, Any]:
    """The config as JSON; OUT must be new, or hold the same audit, which resumes."""
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    asked["contents"] = pairs.digest()
    if trusted is not None:
        asked["trusted_contents"] = trusted.pairs.digest()
    check_config(out, CONFIG, asked, what=AUDIT, may_change=MAY_CHANGE)
    return asked


def _features(
    name: str,
    config: AuditConfig,
    folder: Path,
    pairs: PreferenceDataset,
    cache: Path,
) -> Features:
    architecture = read_architecture(folder)
    check_fits([name], pairs, str(folder), architecture)
    dtype = config.compute_dtype or default_compute_dtype()
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    with jax.set_mesh(mesh):
        model = build(architecture, Numerics(compute_dtype=dtype))
        params = load_params(folder, model)
        return feature_store.compute(
            pairs,
            feature_store.make_feature_step(model),
            params,
            source=name,
            folder=cache,
            digest=weights_digest(folder, dtype),
            width=2 * architecture.hidden_size + 1,
            batch_size=rows_for(2 * len(pairs), config.batch_size, mesh),
            mesh=mesh,
        )


def _lines(records) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
