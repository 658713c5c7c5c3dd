"""The text that a run prints: a line for each evaluation, and a summary at the end.

It depends only on plain records, so `metrics.jsonl` gives the same lines as the run.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.report.noise import auto_choice

Record = Mapping[str, Any]

SHOWN = {
    "eval_loss": "loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
    "eval_noise/flip_rate": "flip rate",
    "eval_rewards/mean": "reward",
}
"""The metrics of an evaluation that are printed, and their titles."""
SHARES = {"accuracy", "flip rate"}
"""Titles of metrics that are printed as percentages."""


def evaluation_line(step: int, metrics: Record) -> str:
    """As "step 100: eval loss 0.6107, accuracy 64.2%, margin 0.31".

    Args:
      step: completed optimizer steps.
      metrics: metrics of the evaluation, by their names in `metrics.jsonl`; missing
        ones are left out.
    """
    found = [
        f"{title} {_cell(name, metrics)}"
        for name, title in SHOWN.items()
        if name in metrics
    ]
    if "eval_noise/flip_rate_lower" in metrics:
        found[-1] += " ({} to {})".format(
            *(
                shown("flip rate", metrics[f"eval_noise/flip_rate_{end}"])
                for end in ("lower", "upper")
            )
        )
    return f"step {step}: eval {', '.join(found)}"


def summary_lines(
    records: Sequence[Record],
    *,
    seconds: float,
    out: str,
    exports: Sequence[str],
    start: int = 0,
    best: str = "min:eval_loss",
) -> list[str]:
    """The summary that is printed at the end of a run.

    Args:
      records: lines of `metrics.jsonl`.
      seconds: duration of this process.
      out: folder of the run.
      exports: folders that were exported.
      start: the step at which this process resumed.
      best: "max:" or "min:" and the metric by which the best evaluation is chosen.

    Returns:
      The lines: steps, time, and speed; a table of the first, the best, and the last
      evaluation; what `--objective auto` chose; the locations of the report and the
      export.
    """
    done = max((record["step"] for record in records), default=0)
    steps = f"steps {start + 1} to {done}" if start else counted(done, "step")
    speed = pairs_per_second([r for r in records if r["step"] > start])
    lines = [f"{steps} in {duration(seconds)}"]
    if speed is not None:
        lines[0] += f", {speed:.3g} pairs per second"
    lines += _table(notable_evaluations(records, best=best))
    lines += [f"labels: {found}" for found in [auto_choice(records)] if found]
    lines.append(f"report: {out}/report.html, curves: {out}/curves.png")
    lines.append(f"export: {', '.join(exports)}")
    return lines


def evaluations(records: Sequence[Record]) -> list[Record]:
    """The records of evaluations by step; the last one if a step has several."""
    found = {record["step"]: record for record in records if is_evaluation(record)}
    return [found[step] for step in sorted(found)]


def is_evaluation(record: Record) -> bool:
    """Whether a line of `metrics.jsonl` is one of an evaluation."""
    return any(name.startswith("eval_") for name in record)


def best_criterion(keep_best: str | None, records: Sequence[Record]) -> str:
    """What `--keep-best` names, or else the loss or the reward of the evaluations."""
    if keep_best is not None:
        return keep_best
    samples = any("eval_rewards/mean" in record for record in evaluations(records))
    return "max:eval_rewards/mean" if samples else "min:eval_loss"


def notable_evaluations(records: Sequence[Record], *, best: str) -> dict[str, Record]:
    """The first, the best, and the last evaluation; fewer if there are not as many.

    As for `best.json`, the untrained model (step 0) is never the best, and neither is
    an evaluation whose metric is not finite.
    """
    mode, _, name = best.partition(":")
    found = evaluations(records)
    trained = [r for r in found if r["step"] and r.get(name) is not None]
    choose = max if mode == "max" else min
    notable = {"first": found[0]} if found else {}
    if trained:
        notable["best"] = choose(trained, key=lambda record: record[name])
    if len(found) > 1:
        notable["last"] = found[-1]
    return notable


def pairs_per_second(records: Sequence[Record]) -> float | None:
    """Median over the logged steps; None if no speed was logged."""
    found = [r["pairs_per_second"] for r in records if r.get("pairs_per_second")]
    return statistics.median(found) if found else None


def counted(number: int, what: str) -> str:
    """As "1 step" or "2 steps"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """As "48 seconds", "12.3 minutes", or "5.1 hours"."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def shown(title: str, value: float | None) -> str:
    """Formats a value with the digits that suit its metric; null is "not finite"."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if title in SHARES:
        return f"{100 * value:.1f}%"
    return f"{value:.4f}" if title == "loss" and abs(value) < 100 else f"{value:.3g}"


def _table(notable: Mapping[str, Record]) -> list[str]:
    titles = {
        name: title
        for name, title in SHOWN.items()
        if any(name in record for record in notable.values())
    }
    if not notable:
        return []
    rows = [["evaluation", "step", *titles.values()]]
    for which, record in notable.items():
        cells = [_cell(name, record) for name in titles]
        rows.append([which, str(record["step"]), *cells])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
        for row in rows
    ]


def _cell(name: str, record: Record) -> str:
    if name not in record:
        return ""
    if name == "eval_noise/flip_rate" and record.get("eval_noise/identified") == 0:
        return "not identified"
    return shown(SHOWN[name], record[name])
