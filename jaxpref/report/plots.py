"""PNG figures of runs, drawn from plain records.

A record is a dict with its arm, its seed, and numbers by name.  Arms get their colors
in order of first appearance, so figures from records in the same order have the same
colors.  Nothing here uses pyplot's global state or a display.
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpref.errors import InputError
from jaxpref.report.drawing import drawing
from jaxpref.report.seeds import mean_and_deviation
from jaxpref.report.style import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """Plots reward against the KL divergence from the reference, for each arm.

    Thin lines connect the points of a seed, in order.  The large dot is the mean of the
    seeds' last points, and the error bars are their standard deviations.

    Args:
      path: the PNG to write.
      points: records with the fields `x`, `y`, and `arm`.  `seed` and `order` are
        needed if an arm has several seeds or a seed several points.
      x: name of the horizontal field.
      y: name of the vertical field.
      arm: name of the field that identifies the arm.
      seed: name of the field that distinguishes runs of one arm.
      order: name of the field that orders the points of a run, e.g. the step.
      x_label: axis label.
      y_label: axis label.
      title: title of the figure.

    Raises:
      InputError: if there is nothing to draw, a value is not a finite number, or the
        file cannot be written.
    """
    arms = _grouped(points, arm, needs=(x, y), allows=(order,), path=path)
    with drawing(path, size=(6.6, 4.3)) as figure:
        axes = figure.add_subplot()
        for color, (name, records) in zip(_colors(arms), arms.items()):
            ends = []
            for run in _grouped(records, seed, path=path).values():
                run = sorted(run, key=lambda record: record.get(order) or 0)
                at = [record[x] for record in run], [record[y] for record in run]
                axes.plot(*at, color=color, lw=1, alpha=0.35, zorder=2)
                axes.scatter(*at, color=color, s=9, alpha=0.35, lw=0, zorder=2)
                ends.append((run[-1][x], run[-1][y]))
            (x_mean, x_spread), (y_mean, y_spread) = map(mean_and_deviation, zip(*ends))
            axes.errorbar(
                x_mean, y_mean, yerr=y_spread, xerr=x_spread, color=color, fmt="none",
                lw=1.2, zorder=3,
            )  # fmt: skip
            axes.scatter(
                x_mean, y_mean, color=color, s=64, edgecolor="white", lw=1.2, zorder=4,
                label=name,
            )  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label)
        _finish(figure, axes, title=title)


def frontiers(
    path: str | Path,
    points: Iterable[Record],
    *,
    best: Iterable[Record] = (),
    new: Iterable[Record] = (),
    x: str = "kl",
    y: str = "reward",
    arm: str = "arm",
    setting: str = "beta",
    x_label: str = "KL to the reference (nats)",
    y_label: str = "gold reward",
    title: str = "",
) -> None:
    """Plots reward against KL for sweeps of several arms over a setting.

    Small dots are runs.  A line connects the means of an arm's settings in order of
    `x`, with the standard deviations over runs as error bars.

    Args:
      path: the PNG to write.
      points: records with the fields `x`, `y`, `arm`, and `setting`.  Several records
        with the same arm and setting are draws.
      best: records with `x` and `y`, in order: the best possible, a dark line.  It is
        shown only as far as the points go.
      new: more records of the same arms, drawn as diamonds over the others.
      x: name of the horizontal field.
      y: name of the vertical field.
      arm: name of the field that identifies the arm.
      setting: name of the field that the sweep varies.
      x_label: axis label.
      y_label: axis label.
      title: title of the figure.

    Raises:
      InputError: if there is nothing to draw, a value is not a finite number, or the
        file cannot be written.
    """
    arms = _grouped(points, arm, needs=(x, y), path=path)
    added, best = list(new), list(best)
    if added:
        _grouped(added, arm, needs=(x, y), path=path)
    if best:
        _grouped(best, arm, needs=(x, y), path=path)
    drawn = [record for records in arms.values() for record in records] + added
    right = 1.08 * max(record[x] for record in drawn)
    with drawing(path, size=(6.6, 4.6)) as figure:
        axes = figure.add_subplot()
        if shown := [record for record in best if record[x] <= right]:
            at = [record[x] for record in shown], [record[y] for record in shown]
            axes.plot(*at, color=INK, lw=1.4, zorder=1, label="best possible")
        for color, (name, records) in zip(_colors(arms), arms.items()):
            means = []
            for runs in _grouped(records, setting, path=path).values():
                at = [run[x] for run in runs], [run[y] for run in runs]
                axes.scatter(*at, color=color, s=9, alpha=0.35, lw=0, zorder=2)
                means.append(tuple(map(mean_and_deviation, at)))
            (x_means, x_spreads), (y_means, y_spreads) = (
                zip(*values) for values in zip(*sorted(means))
            )
            axes.errorbar(
                x_means, y_means, yerr=y_spreads, xerr=x_spreads, color=color,
                marker="o", ms=5, mec="white", mew=0.8, lw=1.6, elinewidth=1, zorder=3,
                label=name,
            )  # fmt: skip
            at = [[r[key] for r in added if r.get(arm) == name] for key in (x, y)]
            axes.scatter(
                *at, marker="D", s=34, facecolor="none", edgecolor=color, lw=1.3,
                zorder=4,
            )  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label)
        _finish(figure, axes, title=title)


def grouped_bars(
    path: str | Path,
    records: Iterable[Record],
    *,
    value: str,
    group: str,
    arm: str = "arm",
    y_label: str = "",
    title: str = "",
) -> None:
    """Plots the mean of a number as bars, one for each arm in each group.

    Error bars are standard deviations over the records of a bar.

    Args:
      path: the PNG to write.
      records: with the fields `value`, `group`, and `arm`.
      value: name of the number, a share from 0 to 1.
      group: name of the field that identifies the group.
      arm: name of the field that identifies the arm.
      y_label: axis label.
      title: title of the figure.

    Raises:
      InputError: if there is nothing to draw, a value is not a finite number, or the
        file cannot be written.
    """
    arms = _grouped(records, arm, needs=(value,), path=path)
    names = list(dict.fromkeys(r[group] for found in arms.values() for r in found))
    width = 0.78 / len(arms)  # the centers of groups are 1 apart
    with drawing(path, size=(7.6, 4.4)) as figure:
        axes = figure.add_subplot()
        for n, (color, (name, found)) in enumerate(
            zip(_colors(arms), arms.items(), strict=True)
        ):
            values = [[r[value] for r in found if r[group] == x] for x in names]
            means, spreads = zip(*map(mean_and_deviation, values))
            left = (n - (len(arms) - 1) / 2) * width
            at = [place + left for place in range(len(names))]
            axes.bar(at, means, 0.9 * width, yerr=spreads, color=color, label=name)
        axes.set(ylabel=y_label, xticks=range(len(names)), xticklabels=names)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        _finish(figure, axes, title=title)


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
    """Plots metrics over training or over another variable, one panel per metric.

    Lines are means over seeds, and bands are plus or minus one standard deviation.  It
    also plots sweeps: `x="flip_rate"`.

    Args:
      path: the PNG to write.
      records: records with the fields `x`, `arm`, and some of the metrics.  Several
        records of one arm at the same `x` are seeds.  A metric may be missing or None
        in some records but not in all.
      metrics: field names, or a mapping from field names to panel titles.
      x: name of the horizontal field.
      arm: name of the field that identifies the arm.
      x_label: axis label; the field's name if None.
      title: title of the figure.

    Raises:
      InputError: if there is nothing to draw, a value is not a finite number, or the
        file cannot be written.
    """
    titles = metrics if isinstance(metrics, Mapping) else {m: m for m in metrics}
    if not titles:
        raise InputError(f"{path}: no metrics to draw; name at least one")
    arms = _grouped(records, arm, needs=(x,), allows=titles, path=path)
    for metric in titles:
        if all(run.get(metric) is None for runs in arms.values() for run in runs):
            raise InputError(
                f"{path}: no record has a number {metric!r} to draw; check the name"
            )
    columns = min(len(titles), 3)
    rows = math.ceil(len(titles) / columns)
    size = max(6.6, 2.8 * columns), 2.6 * rows + 0.6
    with drawing(path, size=size) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        # `panels` last: `zip` must not consume a panel when the metrics end.
        for (metric, panel_title), axes in zip(titles.items(), panels):
            for color, (name, runs) in zip(_colors(arms), arms.items()):
                found = [run for run in runs if run.get(metric) is not None]
                at = _grouped(sorted(found, key=lambda run: run[x]), x, path=path)
                stats = [
                    mean_and_deviation(r[metric] for r in same) for same in at.values()
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
        _finish(figure, figure.axes[0], title=title)


def _grouped(
    records: Iterable[Record],
    field: str,
    *,
    path,
    needs: Sequence[str] = (),
    allows: Iterable[str] = (),
) -> dict[Any, list[Record]]:
    """Groups records by the value of a field, in order of first appearance.

    Raises InputError unless every record has finite numbers in the fields of `needs`,
    and finite numbers or nothing in those of `allows`.
    """
    groups: dict[Any, list[Record]] = {}
    for number, record in enumerate(records, 1):
        for name in needs:
            if record.get(name) is None:
                raise InputError(
                    f"{path}: record {number} has no number {name!r} to draw "
                    f"(it has {', '.join(map(repr, record))})"
                )
        for name in (*needs, *allows):
            value = record.get(name, 0)
            if value is not None and not _drawable(value):
                raise InputError(
                    f"{path}: record {number}: {name!r} is {value!r}; only finite "
                    "numbers can be drawn"
                )
        groups.setdefault(record.get(field), []).append(record)
    if needs and not groups:
        raise InputError(f"{path}: no records to draw")
    return groups


def _drawable(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _colors(arms: Mapping) -> list[str]:
    return [PALETTE[number % len(PALETTE)] for number in range(len(arms))]


def _finish(figure: "Figure", axes: "Axes", *, title: str) -> None:
    """Adds the title, and a legend below the panels."""
    handles, labels = axes.get_legend_handles_labels()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if any(label != "None" for label in labels):
        # As many columns as fit: about 14 characters per inch, 6 of them per handle.
        width = 14 * figure.get_figwidth()
        columns = max(1, int(width // (max(map(len, labels)) + 6)))
        lines = math.ceil(len(labels) / columns)
        figure.legend(
            handles, labels, loc="outside lower left", fontsize=9,
            ncols=math.ceil(len(labels) / lines),
        )  # fmt: skip
