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

from jaxpref.data import PreferenceDataset
from jaxpref.data.bad_rows import write_skipped
from jaxpref.errors import InputError
from jaxpref.evaluate import audit_summary
from jaxpref.evaluate.annotators import annotators_csv, closer_look
from jaxpref.evaluate.audit_config import AuditConfig as AuditConfig
from jaxpref.evaluate.audit_inputs import Opened, open_pairs, part_of, reward_folder
from jaxpref.evaluate.audit_records import cleaned, source_names
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
from jaxpref.models.hub import resolve_folder
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import log
from jaxpref.runtime.run_folder import check_config, open_out

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
    annotators: list[dict[str, Any]]
    """See `annotators.closer_look`; with the texts of the most suspicious pairs as
    `suspects`."""


def run(config: AuditConfig) -> Audit:
    """Audits a file and writes all of OUT except the pages."""
    reads = {
        "--data": config.data,
        "--model": config.model,
        "--reward-model": config.reward_model,
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
    if config.reward_model is not None:
        reward_folder(config)  # the wrong kind of model is refused before any work
    opened = open_pairs(config.data, config, folder, config.annotator_field)
    trusted = None
    if config.trusted is not None:
        trusted = open_pairs(config.trusted, config, folder, None)
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
    part = part_of(opened, config, folder)
    known = None if trusted is None else part_of(trusted, config, folder)
    log(f"judging {len(pairs)} pairs in {config.folds} folds")
    found = judge(part, known, folds=config.folds, seed=config.seed)
    before = _estimate(config, found, votes)
    judged = dataclasses.replace(
        before, posterior=probabilities(before.posterior, said)
    )
    order = np.lexsort((found.margins, judged.posterior))
    rows = audit_summary.rows_of(judged, found, votes, said, pairs, order, config)
    preferred = _preferred(config, opened, part, found, votes)
    unsaid = order[said[order] == ""]  # a verdict settles a label
    looks = unsaid[: config.top]
    summary = audit_summary.summarize(judged, found, votes, part.keys, opened.report)
    summary |= audit_summary.acted(judged, rows, config)
    summary["confounders"] = config.held_fixed
    summary["advice"] = advice(summary)
    # Known flips measure the ranking that the labels alone give, without verdicts.
    beside = rankings(part.answers, found.folds)
    summary |= audit_summary.compared(
        found, before.posterior, beside, pairs.columns["is_flipped"]
    )
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
    listed = lambda some: [rows[n] | opened.texts(n) for n in some]
    close = closer_look(summary["annotators"], preferred, votes.annotator_names, unsaid)
    result = Audit(
        summary,
        rows,
        listed(unsaid[: config.top]),
        agreement_bins(judged.margins),
        preferred,
        [look | {"suspects": listed(look["labels"])} for look in close],
    )
    write_json(out / CONFIG, asked)  # from now on, OUT belongs to this audit
    write_skipped(out, opened.skipped, config.on_bad_row)
    _write(out, result, opened)
    if not applies_own(config):
        write_whole(out / REVIEW, review_csv(listed(looks)))
    return result


def _write(out: Path, found: Audit, opened: Opened) -> None:
    """Writes the results, except for the review list."""
    write_whole(out / "audit.jsonl", _lines(found.pairs))
    write_whole(out / "clean.jsonl", _lines(cleaned(opened.source, found.pairs)))
    write_whole(out / "preferences.csv", preferences_csv(found.preferences))
    write_whole(out / "annotators.csv", annotators_csv(found.summary["annotators"]))
    write_json(out / "summary.json", found.summary)


def applies_own(config: AuditConfig) -> bool:
    """Whether the verdicts to apply are in OUT/review.csv, which then stays."""
    if config.apply is None:
        return False
    return Path(config.apply).resolve() == (Path(config.out) / REVIEW).resolve()


def _said(
    config: AuditConfig, pairs: PreferenceDataset, votes: Votes, trusted: Opened | None
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


def _preferred(
    config: AuditConfig, opened: Opened, part: Part, found: Judgment, votes: Votes
) -> list[dict[str, Any]]:
    """What the labels prefer, and the model's own ranking."""
    rows = opened.pairs.columns["row"]
    labels = Labels(
        found.surface,
        part.keys,
        votes.annotator_names,
        source_names(opened.source, rows, config.source_field),
    )
    own = _own_ranking(part.found)
    return preferences(labels, own, confounders=config.held_fixed)


def _own_ranking(found: Features) -> np.ndarray:
    """The model's log-prob per token: preferred minus other answer."""
    each = found.logps.astype(np.float64) / found.lengths
    return each[:, 0] - each[:, 1]


def _checked_config(
    config: AuditConfig,
    pairs: PreferenceDataset,
    trusted: Opened | None,
    out: Path,
) -> dict[str, Any]:
    """The config as JSON; OUT must be new, or hold the same audit, which resumes."""
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    asked["contents"] = pairs.digest()
    if trusted is not None:
        asked["trusted_contents"] = trusted.pairs.digest()
    check_config(out, CONFIG, asked, what=AUDIT, may_change=MAY_CHANGE)
    return asked


def _lines(records) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
