"""`jaxpref evaluate`: scores the records of a file and writes metrics."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import PreferenceDataset
from jaxpref.data.bad_rows import FILE, write_skipped
from jaxpref.errors import InputError, show
from jaxpref.evaluate import results
from jaxpref.evaluate.audit_records import example_at, texts_of
from jaxpref.evaluate.baselines import say_missing, text_baseline
from jaxpref.evaluate.benchmarks import benchmark_scores
from jaxpref.evaluate.checkpoints import checkpoint_lines, checkpoint_metrics
from jaxpref.evaluate.difficulty import ranking_metrics
from jaxpref.evaluate.groups import (
    CHES_BIN,
    by_group,
    equal_bins,
    group_values,
    table_lines,
)
from jaxpref.evaluate.metrics import reliability_bins, wilson_interval
from jaxpref.evaluate.paired import paired_metrics
from jaxpref.evaluate.pairs import EvaluateConfig, open_pairs
from jaxpref.evaluate.results import Results
from jaxpref.files import check_output_folder, write_json, write_whole
from jaxpref.models.weights import Weights, head_of, is_reward
from jaxpref.runtime.processes import log
from jaxpref.runtime.run_folder import locked
from jaxpref.scoring.run_weights import named_weights

METRICS, PAGE, CARD = "metrics.json", "evaluation.html", "evaluation.md"
FILES = (METRICS, PAGE, CARD, *(kind.file for kind in results.ALL))
"""Names of the files that an evaluation may write."""
LOCK = ".evaluate.lock"
"""The file that a process locks while it writes them."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, Any]
    """The contents of `metrics.json`."""
    lines: list[dict[str, Any]]
    """The contents of the file with a line per record."""
    results: Results
    """What is measured of such records."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Scores every record; writes `metrics.json` and a line per record to `out`.

    Returns:
      The metrics of `results.results_of`: of pairs, `preference_metrics` of the reward
      margins; of labeled answers, `answer_metrics`; of rated ones, correlations and
      distances; of lists, `list_metrics`; means of the scores; and `length_only/...`,
      what the lengths of the answers achieve alone.
      `by` has the statistics of `by_group` by field and group, `against` the
      comparison of `paired_metrics` with the second model, `benchmark` the scores of a
      published benchmark, and `checkpoints` those of `checkpoint_metrics`.

    Raises:
      InputError: for anything that the caller can fix.
    """
    return evaluate(config).metrics


def evaluate(config: EvaluateConfig) -> Evaluation:
    """As `run`, with the lines."""
    names = ("model", "data", "adapter", "reference", "against", "checkpoints")
    reads = {f"--{x}": getattr(config, x) for x in names}
    out = check_output_folder("--out", config.out, (*FILES, FILE), reads)
    _check_foreign(out)
    with locked(out, LOCK):
        return _evaluate(config, out)


def reliability(found: Evaluation) -> list[dict[str, float]]:
    """`reliability_bins` of pairs, with 95% intervals; empty for other records."""
    if found.results is not results.PAIRS:
        return []
    bins = []
    for one in reliability_bins(np.array([x["margin"] for x in found.lines])):
        low, high = wilson_interval(one["accuracy"], int(one["pairs"]))
        bins.append(one | {"low": low, "high": high})
    return bins


def _evaluate(config: EvaluateConfig, out: Path) -> Evaluation:
    splits, score = open_pairs(_of_model(config))
    records, found = splits.train, results.results_of(splits.kind)
    write_skipped(out, splits.skipped, config.on_bad_row)
    if found.hits is None:
        _check_no_accuracy(config)
    source = data.open_records(config.data, config, sides=splits.kind.sides)
    # Unknown fields are reported before the model is read.
    groups = {
        x: group_values(source, records, x, config.data)
        for x in config.by
        if x != CHES_BIN
    }
    weights = named_weights(config.model, config.adapter)
    _check_ches(config, splits.kind, weights)
    rewards, scores, of_pairs = score(weights)
    try:
        metrics: dict[str, Any] = found.metrics(records, rewards, scores)
    except InputError as error:
        raise InputError(f"{config.data}: {error}") from None
    prompts = records.columns["prompt"]
    hits = None if found.hits is None else found.hits(records, rewards)
    per_record: dict[str, np.ndarray] = dict(of_pairs)
    if splits.kind.sides == 2:
        more, further = _of_pairs(config, source, records, scores)
        metrics |= more | _means(of_pairs)
        per_record |= further
    if CHES_BIN in config.by:
        groups[CHES_BIN] = equal_bins(of_pairs["normalized_ches"])
    if groups and hits is not None:
        margins = rewards[:, 0] - rewards[:, 1] if splits.kind.sides == 2 else None
        metrics["by"] = {
            field: by_group(groups[field], hits, prompts, margins)
            for field in config.by
        }
    if known := benchmark_scores(source, records, rewards):
        metrics["benchmark"] = known
    if config.checkpoints and (hits_of := found.hits) is not None:
        of = lambda weights: hits_of(records, score(weights).rewards)
        metrics["checkpoints"] = checkpoint_metrics(config, of)
    if config.against is not None and hits is not None:
        metrics["against"] = {"model": config.against, **_paired(config, records, hits)}
    lines = found.lines(records, rewards, scores)
    for name, values in per_record.items():
        lines = [x | {name: float(y)} for x, y in zip(lines, values, strict=True)]
    if jax.process_index() == 0:
        for other in results.ALL:  # of an earlier evaluation
            (out / other.file).unlink(missing_ok=True)
        write_whole(out / found.file, "".join(json.dumps(x) + "\n" for x in lines))
        write_json(out / METRICS, metrics)
        _show(metrics)
    return Evaluation(metrics, lines, found)


def _of_model(config: EvaluateConfig) -> EvaluateConfig:
    """Without weights of attributes, if only `config.against` predicts any."""
    if not config.attribute_weights or config.against is None:
        return config
    one, two = (named_weights(x, None) for x in (config.model, config.against))
    if head_of(two).attributes and not head_of(one).attributes:
        return dataclasses.replace(config, attribute_weights=())
    return config


def _show(metrics: Mapping[str, Any]) -> None:
    """Prints the metrics, and a table for each field of `by`."""
    for name, value in metrics.items():
        if not isinstance(value, dict):
            show(f"{name:27} {value:.4f}")
    if known := metrics.get("benchmark"):
        show(f"\n{known['name']}")
        for name, value in known["scores"].items():
            show(f"{name:27} {value:.4f}")
    for field, groups in metrics.get("by", {}).items():
        show("\n" + "\n".join(table_lines(field, groups)))
    if several := metrics.get("checkpoints"):
        show("\n" + "\n".join(checkpoint_lines(several)))
    if other := metrics.get("against"):
        show(
            "\naccuracy {accuracy:.4f}; of {model}, {baseline_accuracy:.4f}; "
            "difference {difference:+.4f} (95% interval {difference_low:+.4f} to "
            "{difference_high:+.4f}), McNemar's p {mcnemar_p:.3g}".format(**other)
        )


def _of_pairs(
    config: EvaluateConfig,
    source: data.Source,
    pairs: PreferenceDataset,
    scores: results.Scores,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Further metrics of pairs, and numbers of each pair."""
    metrics, per_pair = {}, {}
    if "logps" in scores:
        reference = None if config.reference is None else scores["reference_logps"]
        metrics, per_pair = ranking_metrics(
            scores["logps"], reference, beta=config.implicit_beta
        )
    if config.text_baseline:
        texts = [
            texts_of(example_at(source, row)) for row in pairs.columns["row"].tolist()
        ]
        answers = [(x["chosen"], x["rejected"]) for x in texts]
        found = text_baseline(answers, [x["prompt"] for x in texts])
        if found is None:
            log(say_missing(("tfidf_lengths",)))
        metrics |= found or {}
    return metrics, per_pair


def _paired(
    config: EvaluateConfig, records: PreferenceDataset, hits: np.ndarray
) -> Mapping[str, float]:
    """The comparison with `config.against` on the records that both models can read."""
    weights = named_weights(str(config.against), None)
    config = dataclasses.replace(config, model=str(config.against), adapter=None)
    if not head_of(weights).attributes:
        config = dataclasses.replace(config, attribute_weights=())
    if is_reward(weights):
        config = dataclasses.replace(config, reference=None, beta=None)
    splits, score = open_pairs(config)
    rewards = score(weights).rewards
    hits_of = results.results_of(splits.kind).hits
    assert hits_of is not None, "the records are those of the first model"
    others = hits_of(splits.train, rewards)
    _, own, other = np.intersect1d(records.ids, splits.train.ids, return_indices=True)
    if not len(own):
        raise InputError(
            f"--against {config.model}: can read none of the records that --model can; "
            "choose another --max-length"
        )
    return paired_metrics(hits[own], others[other], records.columns["prompt"][own])


def _means(of_pairs: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {f"ranking/{name}": float(x.mean()) for name, x in of_pairs.items()}


def _check_ches(config: EvaluateConfig, kind: data.Kind, weights: Weights) -> None:
    """Refuses bins of CHES scores where there are none."""
    if CHES_BIN in config.by and (kind.sides != 2 or is_reward(weights)):
        raise InputError(
            f"--by {CHES_BIN}: only pairs have CHES scores, under a language model; "
            "leave it out"
        )


def _check_no_accuracy(config: EvaluateConfig) -> None:
    """Refuses options that compare accuracies, if there are none."""
    for name in ("by", "against", "checkpoints"):
        if getattr(config, name):
            raise InputError(
                f"--{name}: compares accuracies, and ratings have none; leave it out, "
                "or evaluate on pairs with --attribute-weights"
            )


def _check_foreign(out: Path) -> None:
    """Refuses a folder with files of these names that no evaluation wrote."""
    written = [kind for kind in results.ALL if (out / kind.file).exists()]
    for name in (METRICS, PAGE, CARD):
        if (out / name).exists() and not written:
            raise InputError(
                f"--out {out}: has {name} without {results.PAIRS.file}, so another "
                "program wrote it; use another folder"
            )
    for kind in written:
        with (out / kind.file).open("rb") as file:
            first = file.readline(1_000_000)
        try:
            ours = not first or {"id", "row", kind.field} <= json.loads(first).keys()
        except (ValueError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise InputError(
                f"--out {out}: its {kind.file} was not written by `jaxpref evaluate`, "
                "which would overwrite it; use another folder"
            )
