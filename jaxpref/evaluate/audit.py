"""`jaxpref audit`: finds probably wrong labels and unreliable annotators.

Every pair is judged by a model that was not trained on it or its prompt: a
Bradley-Terry model on frozen features, cross-fitted by prompt.  The margins are
calibrated jointly with the flip rate.  EM then estimates the reliability of each
annotator and the probability that each label is right.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset
from jaxpref.data.shared_prompts import grouped_keys
from jaxpref.errors import InputError
from jaxpref.evaluate import features as feature_store
from jaxpref.evaluate.audit_config import AuditConfig as AuditConfig
from jaxpref.evaluate.audit_records import (
    cleaned,
    example_at,
    named_annotators,
    texts_of,
)
from jaxpref.evaluate.crossfit import cross_fit, prompt_folds, scaled
from jaxpref.evaluate.estimate import ASSUMPTION, Estimate, estimate
from jaxpref.evaluate.features import Features
from jaxpref.evaluate.flips import agreement_bins, known_flips
from jaxpref.evaluate.metrics import accuracy, wilson_interval
from jaxpref.evaluate.review import acted_on, advice, review_csv, rule
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
MAY_CHANGE = (
    *("out", "features", "batch_size", "mesh"),
    *("action", "threshold", "action_top", "top"),
)
"""Settings that may change when an audit is repeated with the same OUT."""
THRESHOLD = 0.5
"""The default of `threshold`."""
STRONG = 3.0
"""Scale of the few length and log-prob columns relative to the hidden states, so that
their coefficients are penalized nine times less."""


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


def run(config: AuditConfig) -> Audit:
    """Audits a file and writes all of OUT except the report page."""
    reads = {"--data": config.data, "--model": config.model}
    opened = open_out(config.out, CONFIG, what=AUDIT, writes=AUDIT_FILES, reads=reads)
    with opened as out:
        return _run(config, out)


def _run(config: AuditConfig, out: Path) -> Audit:
    if jax.process_count() > 1:
        raise InputError("an audit runs in a single process; start it on one machine")
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    folder = resolve_folder(config.model)
    source = named_annotators(
        data.open_source(config.data), config.annotator_field, config.ignore_fields
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
            f"{config.data} row {pairs.columns['row'][twice] + 1}: has several traces "
            "per answer; an audit judges each record once, so keep only one trace"
        )
    for line in (plan.describe(), plan.fields.describe()):
        log(f"{config.data}: {line}")
    if config.action_top is not None and config.action_top >= len(pairs):
        raise InputError(
            f"--action-top {config.action_top}: must be below the {len(pairs)} pairs "
            "that can be judged"
        )
    asked = _checked_config(config, pairs, out)
    found = _features(config, folder, pairs, Path(config.features or out / "features"))
    examples = [example_at(source, int(row)) for row in pairs.columns["row"]]
    keys = grouped_keys(example.prompt for example in examples)

    log(f"judging {len(pairs)} pairs in {config.folds} folds")
    columns, lengths = differences(found)
    folds = [
        prompt_folds(keys, folds=config.folds, seed=seed)
        for seed in (config.seed, config.seed + 1)
    ]
    margins = cross_fit(columns, *folds).margins
    by_length = cross_fit(lengths, *folds).margins
    items, orientation = _items(pairs.completion_keys(), pairs.columns["annotator"])
    names = [
        *pairs.annotator_names,
        *([None] if (pairs.columns["annotator"] < 0).any() else []),
    ]
    judged = estimate(
        margins,
        np.where(
            pairs.columns["annotator"] < 0, len(names) - 1, pairs.columns["annotator"]
        ),
        items=items,
        orientation=orientation,
        num_annotators=len(names),
        assumed_flip_rate=config.assumed_flip_rate,
    )
    summary = _summary(judged, margins, by_length, names, items, keys, plan.report)
    order = np.lexsort((margins, judged.posterior))
    rows = _rows(judged, by_length, pairs, order, config)
    summary |= _action(judged, rows, config)
    summary["advice"] = advice(summary)
    if pairs.columns["is_flipped"].any():
        summary["known_flips"] = known_flips(
            judged.posterior, margins, pairs.columns["is_flipped"]
        )
    write_json(out / CONFIG, asked)  # from now on, OUT belongs to this audit
    suspects = [rows[n] | texts_of(examples[n]) for n in order[: config.top]]
    write_whole(out / "audit.jsonl", _lines(rows))
    write_whole(out / "clean.jsonl", _lines(cleaned(source, rows, config.action)))
    write_whole(out / "review.csv", review_csv(suspects))
    write_json(out / "summary.json", summary)
    return Audit(summary, rows, suspects, agreement_bins(judged.margins))


def differences(found: Features) -> tuple[np.ndarray, np.ndarray]:
    """Chosen minus rejected: columns for the model, and the log-lengths alone.

    Returns:
      float64 [N, 2 D + 3] of hidden states, summed and average log-probs, and
      log-lengths; and [N, 1] of log-lengths.  Columns have a mean square of 1, except
      that log-probs and log-lengths in the first array are scaled by `STRONG`.
    """
    side = lambda values: values[:, 0].astype(np.float64) - values[:, 1]
    lengths = found.lengths.astype(np.float64)
    few = [found.logps, found.logps / lengths, np.log(lengths)]
    few = scaled(np.stack([side(values) for values in few], axis=1))
    states = scaled(side(found.states))
    return np.concatenate([states, STRONG * few], axis=1), few[:, -1:]


def _checked_config(
    config: AuditConfig, pairs: PreferenceDataset, out: Path
) -> dict[str, Any]:
    """The config as JSON; OUT must be new, or hold the same audit, which resumes."""
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    asked["contents"] = pairs.digest()
    check_config(out, CONFIG, asked, what=AUDIT, may_change=MAY_CHANGE)
    return asked


def _features(
    config: AuditConfig, folder: Path, pairs: PreferenceDataset, cache: Path
) -> Features:
    architecture = read_architecture(folder)
    check_fits([config.data], pairs, str(folder), architecture)
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
            source=config.data,
            folder=cache,
            digest=weights_digest(folder, dtype),
            width=2 * architecture.hidden_size + 1,
            batch_size=rows_for(2 * len(pairs), config.batch_size, mesh),
            mesh=mesh,
        )


def _items(keys: np.ndarray, annotators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which votes judge the same pair of texts, and which text each vote prefers.

    Duplicates of a record without an annotator are not independent votes; each is its
    own item.
    """
    _, ranks = np.unique(keys, return_inverse=True)
    ranks = ranks.reshape(keys.shape)
    alone = np.where(annotators < 0, np.arange(len(keys)), -1)
    votes = np.concatenate([np.sort(ranks, axis=1), alone[:, None]], axis=1)
    _, items = np.unique(votes, axis=0, return_inverse=True)
    return items.ravel(), np.where(ranks[:, 0] < ranks[:, 1], 1, -1)


def _summary(
    judged: Estimate,
    margins: np.ndarray,
    by_length: np.ndarray,
    names: Sequence[str | None],
    items: np.ndarray,
    prompts: Sequence[str],
    report: dict[str, int],
) -> dict[str, Any]:
    def measured(values: np.ndarray) -> dict[str, Any]:
        share = accuracy(values)
        return {"accuracy": share, "interval": wilson_interval(share, len(values))}

    annotators = [
        {
            "annotator": name,
            "reliability": float(judged.reliability[k]),
            "interval": [float(judged.lower[k]), float(judged.upper[k])],
            "count": int(judged.counts[k]),
        }
        for k, name in enumerate(names)
    ]
    return {
        "pairs": len(margins),
        "items": int(items.max()) + 1,
        "prompts": len(set(prompts)),
        "flip_rate": judged.flip_rate,
        "flip_rate_interval": list(judged.flip_rate_interval),
        "assumption": ASSUMPTION,
        "identified": judged.identified,
        "reason": judged.reason,
        "assumed_flip_rate": judged.assumed_flip_rate,
        "temperature": judged.temperature,
        "model": measured(margins),
        "length_only": measured(by_length),
        "annotators": sorted(annotators, key=lambda a: (a["reliability"], -a["count"])),
        "rows": report["rows"],
        "not_judged": {
            name.removeprefix("dropped: "): count
            for name, count in sorted(report.items())
            if name.startswith("dropped: ") and count
        },
    }


def _action(
    judged: Estimate, rows: Sequence[dict[str, Any]], config: AuditConfig
) -> dict[str, Any]:
    """What was done to the file, for the summary."""
    count = sum(row["action"] != "keep" for row in rows)
    chosen = {"threshold": config.threshold or THRESHOLD, "top": config.action_top}
    return {
        "expected_wrong": float((1 - judged.posterior).sum()),
        "acted_on": {
            "action": config.action,
            "pairs": count,
            "rule": rule(config.action, count, len(rows), **chosen),
            **chosen,
        },
    }


def _rows(
    judged: Estimate,
    by_length: np.ndarray,
    pairs: PreferenceDataset,
    order: np.ndarray,
    config: AuditConfig,
) -> list[dict[str, Any]]:
    acted = acted_on(
        judged.posterior,
        order,
        action=config.action,
        threshold=config.threshold or THRESHOLD,
        top=config.action_top,
    )
    names, rows, rank = pairs.annotator_names, [], np.argsort(order) + 1
    for n in range(len(pairs)):
        p, annotator = float(judged.posterior[n]), int(pairs.columns["annotator"][n])
        rows.append(
            {
                "id": str(pairs.ids[n]),
                "row": int(pairs.columns["row"][n]) + 1,
                "rank": int(rank[n]),
                "p_correct": p,
                "margin": float(judged.margins[n]),
                "length_margin": float(by_length[n]),
                "annotator": names[annotator] if annotator >= 0 else None,
                "action": config.action if acted[n] else "keep",
            }
        )
    return rows


def _lines(records) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
