"""The last evaluation by source, of a run with several files."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.report.html import Section, Table
from jaxpref.report.progress import SHOWN, evaluations, shown

METRICS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
"""The metrics that evaluations report by source, as METRIC/SOURCE."""


def is_of_source(name: str) -> bool:
    """Whether a metric, with or without `eval_`, is that of one source."""
    full = f"eval_{name.removeprefix('eval_')}"
    return any(full.startswith(f"{metric}/") for metric in METRICS)


def source_section(records: Sequence[Mapping[str, Any]]) -> Section | None:
    """A table of the sources, or None if there is only one.

    Args:
      records: lines of `metrics.jsonl`.
    """
    found = evaluations(records)
    first = f"{METRICS[0]}/"
    sources = sorted({n[len(first) :] for r in found for n in r if n.startswith(first)})
    if not sources:
        return None
    last = found[-1]
    listed = [m for m in METRICS if any(f"{m}/{name}" in last for name in sources)]
    rows = [
        [name, *(_cell(last.get(f"{metric}/{name}"), metric) for metric in listed)]
        for name in sources
    ]
    caption = (
        f"Held-out pairs by source, at step {last['step']}. In `metrics.jsonl`, these "
        "are `eval_loss/SOURCE` and so on."
    )
    titles = ["source", *(SHOWN[metric] for metric in listed)]
    return Section("By source", [Table(titles, rows, caption)])


def _cell(value: float | None, metric: str) -> str | None:
    return None if value is None else shown(SHOWN[metric], value).replace("-", "−")
