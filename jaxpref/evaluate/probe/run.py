"""`jaxpref probe`: reads pairs, fits linear heads to frozen features, and writes them.

Everything that is reported of a vote comes from a fit to the other folds.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset, Source
from jaxpref.data.bad_rows import FILE, log_skipped, write_skipped
from jaxpref.data.kinds import LABELED
from jaxpref.errors import InputError
from jaxpref.evaluate.crossfit import fit_path, prompt_folds, scaled
from jaxpref.evaluate.groups import by_group, group_values
from jaxpref.evaluate.paired import paired_metrics
from jaxpref.evaluate.probe import fits
from jaxpref.evaluate.probe.columns import domain_columns
from jaxpref.evaluate.probe.config import PROMPT, ProbeConfig
from jaxpref.evaluate.probe.results import (
    Table,
    column_metrics,
    head_sizes,
    memberships,
    one_head_metrics,
    right,
    several_heads_metrics,
    vote_lines,
)
from jaxpref.evaluate.probe.states import States, open_backbone
from jaxpref.evaluate.votes import votes_of
from jaxpref.files import check_output_folder, write_json, write_whole
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.models.reward import padding_of
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import log
from jaxpref.runtime.run_folder import locked

SUMMARY, VOTES, ANNOTATORS = "probe.json", "votes.jsonl", "annotators.jsonl"
HEADS, MODEL, FEATURES = "heads.safetensors", "model", "features"
LOCK = ".probe.lock"
"""The file that a process locks while it writes the folder."""


def run(config: ProbeConfig) -> dict[str, Any]:
    """Fits the heads; returns the contents of `probe.json`.

    Raises:
      InputError: for anything that the caller can fix.
    """
    if jax.process_count() > 1:
        raise InputError("a probe runs in a single process; start it on one machine")
    files = (SUMMARY, VOTES, ANNOTATORS, HEADS, MODEL, FEATURES, FILE)
    reads = {"--data": config.data, "--model": config.model}
    out = check_output_folder("--out", config.out, files, reads)
    _check_foreign(out)
    with locked(out, LOCK):
        return _run(config, out)


def _run(config: ProbeConfig, out: Path) -> dict[str, Any]:
    folder = resolve_folder(config.model)
    tokenizer = data.load_tokenizer(folder, config.template_options)
    source, splits = _read(config, folder, tokenizer)
    pairs = splits.train
    groups = {x: group_values(source, pairs, x, config.data) for x in config.by}
    columns = domain_columns(source, pairs, config.columns)
    dtype = config.compute_dtype or default_compute_dtype()
    backbone = open_backbone(folder, pairs, config, dtype)
    table = _table(backbone.states(pairs, config), columns, pairs, config)
    log(f"fitting to {len(pairs)} votes in {config.folds} folds")
    found = _fitted(table, config)
    found.summary["by"] = {
        field: by_group(
            values, right(found.margins), pairs.columns["prompt"], found.margins
        )
        for field, values in groups.items()
    }
    heads = (found.heads / table.scales).astype(np.float32)
    write_skipped(out, splits.skipped, config.on_bad_row)
    for name in (SUMMARY, ANNOTATORS):  # of an earlier probe
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / MODEL, ignore_errors=True)
    if found.weights is not None and config.mixed_by != PROMPT:
        write_whole(out / ANNOTATORS, _lines(memberships(found.weights, table)))
    write_whole(out / HEADS, save({"heads": heads}))
    write_whole(out / VOTES, _lines(vote_lines(table, found.single, found.margins)))
    if config.heads == 1 and not config.columns:
        backbone.save(out / MODEL, heads[0], padding_of(tokenizer))
    write_json(out / SUMMARY, found.summary)  # last: all other files are whole
    return found.summary


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """What is reported and written."""

    summary: dict[str, Any]
    single: np.ndarray
    """[N]; held-out margins of one head."""
    margins: np.ndarray
    """[N]; those of all heads."""
    heads: np.ndarray
    """[K, D + columns]; fitted to all votes, in the units of the table."""
    weights: np.ndarray | None
    """See `fits.Heads`; None of one head."""


def _fitted(table: Table, config: ProbeConfig) -> _Fitted:
    single = fits.one_head(table.differences, table.folds, table.inner)
    summary = one_head_metrics(table, single)
    head = fits.final_head(table.differences, single)
    if config.columns:
        summary |= column_metrics(table, config, single, head)
    if config.heads == 1:
        return _Fitted(summary, single.margins, single.margins, head[None], None)
    fit = functools.partial(_several, table, config)
    learned = [table.folds != fold for fold in np.unique(table.folds)]
    penalties = [fits.best_penalty(fit, some, table.inner) for some in learned]
    several = [fit(*one).margins for one in zip(learned, penalties)]
    margins = _held_out(table.folds, several)
    found = fit(np.ones(len(margins), bool), float(np.median(penalties)))
    summary["several"] = several_heads_metrics(margins, single.margins, table)
    summary["heads"] = head_sizes(found.weights, table, config)
    if config.new_votes:
        summary["new_annotators"] = _newcomers(
            table, config, penalties, single.penalties
        )
    return _Fitted(summary, single.margins, margins, found.heads, found.weights)


def _read(
    config: ProbeConfig, folder: Path, tokenizer: Any
) -> tuple[Source, data.Splits]:
    """The records and their pairs, tokenized as for a reward model."""
    if data.first_kind(config.data, config) == LABELED:
        raise InputError(
            f"{config.data}: holds single answers with labels, but a probe is fitted "
            "to pairs; give it records with chosen and rejected, or votes"
        )
    options = DataOptions(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        heldout_fraction=0.0,
        **config.for_other(),
    )
    context = read_architecture(folder).context_length
    source = data.open_records(config.data, config, sides=2)
    plan = data.make_splits(
        source, tokenizer, data.for_model(options, context), whole_turns=True
    )
    log_skipped(plan.skipped)
    plan.fields.check_ignored(config.ignore_fields)
    plan.fields.check_mapped(config.mapped)
    plan.fields.check_rendered(config.template_options, config.data)
    for line in (plan.describe(), plan.fields.describe()):
        log(f"{config.data}: {line}")
    if len(np.unique(plan.train.columns["prompt"])) < 2:
        raise InputError(
            f"{config.data}: all pairs have the same prompt, but a vote is predicted "
            "by a fit to the votes on other prompts; give it pairs on more prompts"
        )
    if config.heads > 1 and config.mixed_by != PROMPT:
        names = plan.train.annotator_names
        if len(names) < 2:
            raise InputError(
                f"--heads {config.heads}: the records of {config.data} name "
                f"{len(names)} annotators; rename their field with --fields "
                "annotator=FIELD, or pass --mixed-by prompt"
            )
        if unnamed := int(np.sum(plan.train.columns["annotator"] < 0)):
            log(
                f"{config.data}: {unnamed:,} votes name no annotator, and are taken as "
                "those of one; rename their field with --fields annotator=FIELD, or "
                "remove them"
            )
    return source, plan


def _table(
    states: States, columns: np.ndarray, pairs: PreferenceDataset, config: ProbeConfig
) -> Table:
    raw = states.answers[:, 0].astype(np.float64) - states.answers[:, 1]
    raw = np.concatenate([raw, columns], axis=1)
    differences = scaled(raw)
    # Undone on the heads, so that they are of the features themselves.
    sizes = np.sqrt(np.mean(raw**2, axis=0))
    votes = votes_of(pairs)
    keys = pairs.columns["prompt"].astype(str)
    folds, inner = (
        prompt_folds(keys, folds=config.folds, seed=n)
        for n in (config.seed, config.seed + 1)
    )
    contexts = states.prompts - states.prompts.mean(axis=0)
    return Table(
        pairs,
        differences,
        np.where(sizes > 0, sizes, 1.0),
        contexts / np.maximum(contexts.std(axis=0), 1e-6),
        folds,
        inner,
        votes.annotators,
        tuple(votes.names),
    )


def _several(
    table: Table, config: ProbeConfig, learned: np.ndarray, penalty: float
) -> fits.Heads:
    options = {"num_heads": config.heads, "penalty": penalty, "seed": config.seed}
    if config.mixed_by == PROMPT:
        return fits.by_prompt(table.differences, table.contexts, learned, **options)
    return fits.by_annotator(
        table.differences,
        table.annotators,
        learned,
        num_annotators=len(table.names),
        **options,
    )


def _newcomers(
    table: Table,
    config: ProbeConfig,
    penalties: list[float],
    single_penalties: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Accuracies about annotators whom the heads do not know, by number of votes.

    Heads are fitted to the other annotators' votes on the other prompts.  Votes of the
    new ones on these prompts give their weights.  The baseline is one head that is
    fitted to the same votes as the heads.

    Args:
      table: all votes.
      config: options.
      penalties: those of several heads, in each fold of the prompts.
      single_penalties: those of one head.
    """
    group = fits.annotator_folds(table.names, folds=config.folds, seed=config.seed)
    group = group[table.annotators]
    counts = (0, *sorted(set(config.new_votes)))
    margins = {count: np.full(len(table.folds), np.nan) for count in counts}
    single = np.full(len(table.folds), np.nan)
    for n, fold in enumerate(np.unique(table.folds)):
        there, new = table.folds != fold, group == fold
        others, judged = there & ~new, new & ~there
        known = _several(table, config, others, penalties[n])
        one = fit_path(table.differences[others], [single_penalties[n]])[:, 0]
        single[judged] = table.differences[judged] @ one
        for count in counts:
            some = fits.first_votes(
                table.annotators, there & new, count, seed=config.seed
            )
            found = fits.placed(
                known.heads,
                table.differences,
                table.annotators,
                some,
                num_annotators=len(table.names),
            )
            margins[count][judged] = found.margins[judged]
    judged = ~np.isnan(margins[0])
    if not judged.any():
        return {}
    prompts, base = table.pairs.columns["prompt"][judged], single[judged]
    return {
        str(count): dict(paired_metrics(right(x[judged]), right(base), prompts))
        for count, x in margins.items()
    }


def _check_foreign(out: Path) -> None:
    """Refuses a folder with files of these names that no probe wrote."""
    for name in (VOTES, ANNOTATORS, HEADS, MODEL):
        # A probe that was interrupted leaves its lock, but no summary.
        if (out / name).exists() and not any(
            (out / own).exists() for own in (SUMMARY, LOCK)
        ):
            raise InputError(
                f"--out {out}: has {name} without {SUMMARY}, so another program wrote "
                "it; use another folder"
            )


def _held_out(folds: np.ndarray, margins: list[np.ndarray]) -> np.ndarray:
    """Of each vote, the margin from the fit that did not see its fold."""
    found = np.zeros(len(folds))
    for fold, of_fold in zip(np.unique(folds), margins, strict=True):
        found[folds == fold] = of_fold[folds == fold]
    return found


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records)
