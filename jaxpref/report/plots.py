"""Figures of runs, drawn from plain records and saved as PNG.

A record is a dict: the arm it belongs to, its seed, and numbers by name.  Arms take
their colours in the order in which they first appear, so figures drawn from records in
one order agree in colour.  Nothing here touches pyplot's global state or a display.
"""

import math
import numbers
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jaxpref.errors import InputError
from jaxpref.report.style import FAINT, MATPLOTLIB, PALETTE

Record = Mapping[str, Any]


def reward_against_kl(
    path: str | Path,
    points: Iterable[Record],
    *,
    x: str = "kl",
    y: str = "reward",
    arm: str = "arm",
    seed: str = "seed",
    order: str = "step",
    x_label: str = "KL to the reference (nats)",
    y_label: str = "gold reward",
    title: str = "",
) -> None:
    """What was gained against how far the policy moved: the frontier of each arm.

    Thin lines join the points of one seed, in order, where it has several; the large
    dot is the mean of the seeds' last points, its cross their standard deviations.

    Args:
      path: the PNG to write.
      points: records with the fields `x`, `y` and `arm`, and `seed` and `order` where
        an arm has several seeds or a seed several points.
      x: name of the horizontal field.
      y: name of the vertical field.
      arm: name of the field that groups.
      seed: name of the field that tells runs of one arm apart.
      order: name of the field that orders the points of a run, e.g. the step.
      x_label: axis label.
      y_label: axis label.
      title: above the figure.

    Raises:
      InputError: if there is nothing to draw or the file cannot be written.
    """
    arms = _grouped(points, arm, needs=(x, y), path=path)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(6.6, 4.3), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, records) in zip(_colors(arms), arms.items()):
            ends = []
            for run in _grouped(records, seed, path=path).values():
                run = sorted(run, key=lambda record: record.get(order, 0))
                at = [record[x] for record in run], [record[y] for record in run]
                axes.plot(*at, color=color, lw=1, alpha=0.35, zorder=2)
                axes.scatter(*at, color=color, s=9, alpha=0.35, lw=0, zorder=2)
                ends.append((run[-1][x], run[-1][y]))
            (x_mean, x_spread), (y_mean, y_spread) = map(_mean_spread, zip(*ends))
            axes.errorbar(
                x_mean, y_mean, y_spread, x_spread, color=color, fmt="none", lw=1.2,
                zorder=3,
            )  # fmt: skip
            axes.scatter(
                x_mean, y_mean, color=color, s=64, edgecolor="white", lw=1.2, zorder=4,
                label=name,
            )  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label)
        _finish(figure, axes, path, title=title)


def training_curves(
    path: str | Path,
    records: Iterable[Record],
    metrics: Mapping[str, str] | Sequence[str],
    *,
    x: str = "step",
    arm: str = "arm",
    x_label: str | None = None,
    title: str = "",
) -> None:
    """Metrics over training (or over any other number), one panel each.

    Lines are means over the seeds, bands reach one standard deviation to either side.
    Also draws a sweep: `x="flip_rate"`.

    Args:
      path: the PNG to write.
      records: records with the fields `x` and `arm` and some of the metrics; several
        records of one arm at one `x` are seeds.
      metrics: field names, or a mapping from field names to panel titles.
      x: name of the horizontal field.
      arm: name of the field that groups.
      x_label: axis label; the field's name if None.
      title: above the figure.

    Raises:
      InputError: if there is nothing to draw or the file cannot be written.
    """
    titles = metrics if isinstance(metrics, Mapping) else {m: m for m in metrics}
    arms = _grouped(records, arm, needs=(x,), path=path)
    columns = min(len(titles), 3)
    rows = math.ceil(len(titles) / columns)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(
            figsize=(max(6.6, 2.8 * columns), 2.6 * rows + 0.6), layout="constrained"
        )
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (metric, panel_title) in zip(panels, titles.items()):
            for color, (name, runs) in zip(_colors(arms), arms.items()):
                found = [run for run in runs if run.get(metric) is not None]
                at = _grouped(sorted(found, key=lambda run: run[x]), x, path=path)
                stats = [
                    _mean_spread([r[metric] for r in same]) for same in at.values()
                ]
                low = [mean - spread for mean, spread in stats]
                high = [mean + spread for mean, spread in stats]
                many = len(at) > 1
                axes.plot(
                    list(at), [mean for mean, _ in stats], color=color, label=name,
                    marker="" if len(at) > 12 or not many else "o", ms=4,
                )  # fmt: skip
                axes.fill_between(list(at), low, high, color=color, alpha=0.13, lw=0)
            axes.set_title(panel_title)
            axes.set_xlabel(x if x_label is None else x_label)
        for axes in panels:
            axes.set_visible(False)
        _finish(figure, figure.axes[0], path, title=title)


def bars(
    path: str | Path,
    records: Iterable[Record],
    value: str,
    *,
    arm: str = "arm",
    label: str | None = None,
    reference: float | None = None,
    reference_label: str = "",
    title: str = "",
) -> None:
    """One bar for each arm, the mean over its seeds, with every seed as a dot.

    Args:
      path: the PNG to write.
      records: records with the fields `value` and `arm`; several of one arm are seeds.
      value: name of the field to show.
      arm: name of the field that groups.
      label: axis label; the field's name if None.
      reference: where to draw a line to compare with, e.g. 1 for all of the gain.
      reference_label: what that line is.
      title: above the figure.

    Raises:
      InputError: if there is nothing to draw or the file cannot be written.
    """
    arms = _grouped(records, arm, needs=(value,), path=path)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(6.6, 0.42 * len(arms) + 1.3), layout="constrained")
        axes = figure.add_subplot()
        for place, (color, (_, runs)) in enumerate(zip(_colors(arms), arms.items())):
            seeds = [run[value] for run in runs]
            mean, _ = _mean_spread(seeds)
            axes.barh(place, mean, height=0.56, color=color, alpha=0.8, lw=0)
            axes.scatter(
                seeds, [place] * len(seeds), s=18, color="white", edgecolor=color,
                lw=1.2, zorder=4,
            )  # fmt: skip
            end = max([mean, 0.0, *seeds])
            axes.annotate(
                f"{mean:.2f}", (end, place), (8, 0), textcoords="offset points",
                va="center", fontsize=9,
            )  # fmt: skip
        axes.set_yticks(range(len(arms)), [str(name) for name in arms])
        axes.tick_params(axis="y", length=0, labelcolor=MATPLOTLIB["text.color"])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=MATPLOTLIB["axes.edgecolor"], lw=0.8, zorder=3)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.1)
        axes.set_xlabel(value if label is None else label)
        if reference is not None:
            axes.axvline(reference, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
            axes.annotate(
                reference_label, (reference, 1), (0, 4), textcoords="offset points",
                xycoords=("data", "axes fraction"), ha="center", fontsize=8.5,
                color=FAINT,
            )  # fmt: skip
        _finish(figure, axes, path, title=title)


def _grouped(
    records: Iterable[Record], field: str, *, path, needs: Sequence[str] = ()
) -> dict[Any, list[Record]]:
    """Records by the value of a field, in order of first appearance."""
    groups: dict[Any, list[Record]] = {}
    for number, record in enumerate(records, 1):
        for name in needs:
            if not isinstance(record.get(name), numbers.Real):
                raise InputError(
                    f"{path}: record {number} has no number {name!r} to draw "
                    f"(it has {', '.join(map(repr, record))})"
                )
        groups.setdefault(record.get(field), []).append(record)
    if needs and not groups:
        raise InputError(f"{path}: no records to draw")
    return groups


def _mean_spread(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread


def _colors(arms: Mapping) -> list[str]:
    return [PALETTE[number % len(PALETTE)] for number in range(len(arms))]


def _finish(figure: Figure, axes, path: str | Path, *, title: str) -> None:
    """Title on the left, legend below it, and the file."""
    handles, labels = axes.get_legend_handles_labels()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if any(label != "None" for label in labels):
        # As many columns as fit: about 14 characters an inch, 6 of them for the handle.
        room = 14 * figure.get_figwidth()
        columns = max(1, int(room // (max(map(len, labels)) + 6)))
        lines = math.ceil(len(labels) / columns)
        figure.legend(
            handles, labels, loc="outside lower left", fontsize=9,
            ncols=math.ceil(len(labels) / lines),
        )  # fmt: skip
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(
            f"{path}: cannot write the figure ({error.strerror}); "
            "free the space or choose another folder"
        ) from error
