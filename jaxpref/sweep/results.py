"""The result of a run of a sweep: read from the run's folder, and stored there."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.files import write_json
from jaxpref.report.progress import evaluations
from jaxpref.runtime.provenance import flat
from jaxpref.scoring.provenance import contents
from jaxpref.train.config import CHECKED_BY_CONTENT, MAY_CHANGE, TrainConfig, to_json
from jaxpref.train.task import Task

RESULT = "result.json"
"""The file in a run's folder with what the sweep knows about the finished run."""
EXPORTED = {"keep_best", "export"}
"""Options that may change when a run is resumed, but decide what it exports."""
Result = dict[str, Any]


def made_by(config: TrainConfig, task: Task) -> dict[str, Any]:
    """What decides the exported model: options, and digests of files, as JSON values.

    Unlike the provenance of a checkpoint, it includes the length of the run.
    """
    ignored = {*CHECKED_BY_CONTENT, *MAY_CHANGE} - EXPORTED
    found = contents(
        task.start, task.reference, task.models, task.datasets, task.earlier
    )
    return {
        "options": flat(to_json(config), but=ignored),
        "contents": {name: content.digest for name, content in found.items()},
    }


def read_result(out: Path, made: Mapping[str, Any]) -> Result | None:
    """The result of a finished run; None if there is none, or it was made otherwise."""
    try:
        result = json.loads((out / RESULT).read_text("utf-8"))
        # A soft prompt is exported as an adapter.
        exported = (out / "export").is_dir() or (out / "adapter").is_dir()
        same = result["made_by"] == made and exported
        return result if same and (out / "metrics.jsonl").is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_result(out: Path, result: Result) -> None:
    """Writes what `read_result` reads."""
    write_json(out / RESULT, result)


def heldout_metrics(
    lines: list[dict[str, Any]], *, step: int | None = None
) -> dict[str, float | int | None]:
    """The metrics of an evaluation, by the names that a sweep's table has for them.

    Args:
      lines: lines of `metrics.jsonl`.
      step: the step of the evaluation; the last one if None.

    Returns:
      `step`, `loss`, `accuracy`, `margin`, and `heldout_log_ratio`: the mean over the
      held-out answers of log pi - log pi_0, with the model before training pi_0.  None
      for what was not measured or is not finite.
    """
    found = {line["step"]: line for line in evaluations(lines)}
    if not found:
        return {}
    step = max(found) if step not in found else step
    line, first = found[step], found.get(0, {})
    names = [f"eval_logps/{side}" for side in ("chosen", "rejected")]
    pairs = [(line.get(n), first.get(n)) for n in names if n in line]
    ratios = [a - b for a, b in pairs if a is not None and b is not None]
    whole = len(ratios) == len(pairs) > 0
    return {
        "step": step,
        "loss": line.get("eval_loss"),
        "accuracy": line.get("eval_rewards/accuracies"),
        "margin": line.get("eval_rewards/margins"),
        "heldout_log_ratio": math.fsum(ratios) / len(ratios) if whole else None,
    }
