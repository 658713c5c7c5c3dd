"""The curves of one run: training and evaluation metrics by step."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpref.report.drawing import drawing
from jaxpref.report.progress import Record
from jaxpref.report.style import FAINT, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING, HELD_OUT = "training batches", "held-out pairs"
SMOOTHED = 20
"""Number of points from which a noisy metric is drawn behind its running mean."""
MARKED = 12
"""Maximum number of points for which each is marked."""
WIDTHS = {1: 7.6, 2: 8.4, 3: 9.6}
"""Width of a figure in inches, by number of columns."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric."""

    metric: str
    label: str
    color: str
    band: tuple[str, str] | None = None
    """Metrics for the ends of an interval."""

    @property
    def evaluation(self) -> bool:
        """Whether it is measured on held-out pairs: few points, all marked."""
        return self.metric.startswith("eval_")


SIDES = (
    ("chosen", "desirable", "best"),
    ("rejected", "undesirable", "worst"),
)
"""Names of better and of worse answers: of pairs, of labeled answers, and of lists."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Metrics that share an axis."""

    title: str
    lines: tuple[Line, ...]
    percent: bool = False
    reference: float | None = None
    """A value to compare with, drawn as a thin line."""
    noisy: bool = True
    """Whether long curves of training are smoothed."""


def both(metric: str, title: str, **options: Any) -> Panel:
    """A metric of training batches and of held-out pairs."""
    lines = (
        Line(metric, TRAINING, PALETTE[0]),
        Line(f"eval_{metric}", HELD_OUT, PALETTE[1]),
    )
    return Panel(title, lines, **options)


def sides(metric: str, title: str, **options: Any) -> Panel:
    """A metric of better and of worse answers, in training and held out."""
    lines = [
        Line(f"{prefix}{metric}/{side}", f"{side}, {where}", color)
        for names, colors in zip(SIDES, (PALETTE[0:8:7], PALETTE[1:4:2]))
        for side in names
        for prefix, where, color in zip(("", "eval_"), ("training", "held out"), colors)
    ]
    return Panel(title, tuple(lines), **options)


def available(panels: Sequence[Panel], records: Sequence[Record]) -> list[Panel]:
    """The panels with something to draw, with only those lines that have data."""
    found = []
    for panel in panels:
        lines = tuple(
            line
            for line in panel.lines
            if any(record.get(line.metric) is not None for record in records)
        )
        if lines:
            found.append(dataclasses.replace(panel, lines=lines))
    return found


def draw(path: Path, panels: Sequence[Panel], records: Sequence[Record]) -> None:
    """Draws the panels, two in a row.

    Args:
      path: the PNG to write.
      panels: at least one, as `available` returns them.
      records: lines of `metrics.jsonl`.

    Raises:
      InputError: if the file cannot be written.
    """
    columns = len(panels) if len(panels) <= 3 else 2
    rows = math.ceil(len(panels) / columns)
    legend = {}
    with drawing(path, size=(WIDTHS[columns], 2.7 * rows + 0.4)) as figure:
        layout: Any = figure.get_layout_engine()
        layout.set(hspace=0.06)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for panel, axes in zip(panels, places):
            _draw_panel(axes, panel, records)
            handles, labels = axes.get_legend_handles_labels()
            legend |= dict(zip(labels, handles))
        for axes in places:
            axes.set_visible(False)
        for axes in figure.axes[: len(panels)][-columns:]:
            axes.set_xlabel("step")
        if len(legend) > 1:
            figure.legend(
                legend.values(), legend.keys(), loc="outside lower left", fontsize=9,
                ncols=4,
            )  # fmt: skip


def points(records: Sequence[Record], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; null becomes NaN, which breaks the line."""
    found = [record for record in records if metric in record]
    values = [math.nan if r[metric] is None else r[metric] for r in found]
    return [record["step"] for record in found], values


def running_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Means over a window around each value, smaller toward the ends; NaN stays NaN.

    The window is symmetric, so that a straight line stays straight.
    """
    means = []
    for place, value in enumerate(values):
        half = min(width // 2, place, len(values) - 1 - place)
        near = [v for v in values[place - half : place + half + 1] if not math.isnan(v)]
        means.append(value if math.isnan(value) else math.fsum(near) / len(near))
    return means


def _draw_panel(axes: "Axes", panel: Panel, records: Sequence[Record]) -> None:
    if panel.reference is not None:
        axes.axhline(panel.reference, color=FAINT, lw=0.8, zorder=1)
    for line in panel.lines:
        _draw_line(axes, line, records, noisy=panel.noisy)
    axes.set_title(panel.title)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    else:
        # An offset above the axis ("1e-6 + 0.69") is easily overlooked.
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))


def _draw_line(
    axes: "Axes", line: Line, records: Sequence[Record], *, noisy: bool
) -> None:
    steps, values = points(records, line.metric)
    marker = "o" if line.evaluation or len(values) <= MARKED else ""
    if noisy and not line.evaluation and len(values) >= SMOOTHED:
        axes.plot(steps, values, color=line.color, alpha=0.3, lw=0.9, zorder=2)
        values = running_mean(values, width=max(5, len(values) // 20))
    axes.plot(
        steps, values, color=line.color, label=line.label, marker=marker, ms=4,
        zorder=4 if line.evaluation else 3,
    )  # fmt: skip
    if line.band:
        low, high = (
            [
                math.nan if r.get(end) is None else r[end]
                for r in records
                if line.metric in r
            ]
            for end in line.band
        )
        if not all(map(math.isnan, low)):
            axes.fill_between(
                steps, low, high, color=line.color, alpha=0.15, lw=0,
                label=f"{line.label}, 95% interval",
            )  # fmt: skip
