"""The numbers of a sweep, from one record for each run: pure functions.

A swept option is a seed if its name is or ends with `seed`; it is numeric if all its
values are numbers.  A setting is a combination of all options except seeds, and a
method one of the options that are neither numeric nor seeds, such as the loss.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.evaluate.frontier import choose_setting, t_interval

Record = Mapping[str, Any]
"""A run: its `options`, its `status`, and its metrics; None for what is not known."""
Over = Mapping[str, Sequence[str]]
"""The swept options and their values."""

METRICS = ("loss", "accuracy", "margin", "heldout_log_ratio", "kl", "reward")
"""What is averaged over the runs of a setting."""


def is_seed(name: str) -> bool:
    """Whether an option is a seed: `seed`, `inject.seed`."""
    return name.rpartition(".")[2] == "seed"


def numeric(over: Over) -> list[str]:
    """The swept options whose values are numbers, without seeds."""
    return [
        name
        for name, values in over.items()
        if not is_seed(name) and all(map(_is_number, values))
    ]


def settings(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Means over the runs of each setting, with spreads and intervals.

    Args:
      records: the runs.

    Returns:
      For each setting its `options`, the number of finished `runs` and of `failed`
      ones, and for each of `METRICS` that all finished runs have: `mean`, `deviation`
      (the standard deviation over runs), and `low` and `high`, the ends of the 95% t
      interval of the mean over runs (None for a single run).
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = tuple((n, v) for n, v in record["options"].items() if not is_seed(n))
        groups.setdefault(key, []).append(record)
    return [_setting(dict(key), group) for key, group in groups.items()]


def _setting(options: dict[str, str], records: Sequence[Record]) -> dict[str, Any]:
    finished = [record for record in records if record["status"] == "finished"]
    found: dict[str, Any] = {
        "options": options,
        "runs": len(finished),
        "failed": len(records) - len(finished),
    }
    for name in METRICS:
        known = [record.get(name) for record in finished]
        if known and all(value is not None for value in known):
            values, single = np.array(known, float), len(known) == 1
            mean, low, high = t_interval(values)
            found[name] = {
                "mean": mean,
                "deviation": None if single else float(np.std(values, ddof=1)),
                "low": None if single else low,
                "high": None if single else high,
            }
    return found


def axes_of_comparison(records: Sequence[Record]) -> tuple[str, str] | None:
    """What is compared with what: the metrics on the horizontal and the vertical axis.

    Horizontally the KL, or else the mean log-ratio of held-out answers; vertically the
    reward, or else the held-out accuracy.  None unless all finished runs have both.
    """
    finished = [record for record in records if record["status"] == "finished"]
    known = lambda name: all(record.get(name) is not None for record in finished)
    x = next((name for name in ("kl", "heldout_log_ratio") if known(name)), None)
    y = next((name for name in ("reward", "accuracy") if known(name)), None)
    return (x, y) if finished and x and y else None


def frontier_points(
    records: Sequence[Record], over: Over, x: str, y: str
) -> list[dict[str, Any]]:
    """The finished runs as points of a figure.

    Runs with the same value of the first numeric option are draws of one point of a
    line; all other options except seeds decide the line.
    """
    along = next(iter(numeric(over)), None)
    points = []
    for record in records:
        if record["status"] != "finished":
            continue
        options = record["options"]
        line = {n: v for n, v in options.items() if n != along and not is_seed(n)}
        points.append(
            {
                "arm": label(line) or record["objective"],
                "setting": options.get(along, ""),
                x: record[x],
                y: record[y],
            }
        )
    return points


def chosen_settings(
    records: Sequence[Record], over: Over, y: str, *, most_kl: float
) -> list[dict[str, Any]]:
    """The setting of each method by the tuning rule; see `frontier.choose_setting`.

    Args:
      records: the runs.
      over: the swept options.
      y: what is to be large: "reward" or "accuracy".
      most_kl: the budget in nats.

    Returns:
      For each method its `method` (options), and either the `setting` (options) with
      its mean `kl` and `value`, or `none`: the reason why there is no such setting.
      Settings with a run that failed are left out.
    """
    swept = numeric(over)
    methods: dict[tuple, dict[tuple, list[Record]]] = {}
    for record in records:
        options = record["options"].items()
        method = tuple((n, v) for n, v in options if n not in swept and not is_seed(n))
        setting = tuple((n, v) for n, v in options if n in swept)
        methods.setdefault(method, {}).setdefault(setting, []).append(record)
    return [
        {"method": dict(method)} | _chosen(by_setting, y, most_kl)
        for method, by_setting in methods.items()
    ]


def _chosen(
    by_setting: Mapping[tuple, list[Record]], y: str, most_kl: float
) -> dict[str, Any]:
    complete = {
        setting: [(record["kl"], record[y]) for record in found]
        for setting, found in by_setting.items()
        if all(record["status"] == "finished" for record in found)
    }
    if not complete:
        return {"none": "every setting has a run that failed"}
    # [draws, settings]: a full grid, since only whole settings are left out.
    kls, values = np.moveaxis(np.array([*complete.values()], float), -1, 0)
    try:
        index = choose_setting(kls.T, values.T, most_kl=most_kl)
    except ValueError as error:
        return {"none": str(error)}
    return {
        "setting": dict([*complete][index]),
        "kl": float(kls[index].mean()),
        "value": float(values[index].mean()),
    }


def as_csv(records: Sequence[Record], over: Over) -> str:
    """One line for each run: its name, its options, and everything known about it."""
    names = dict.fromkeys(n for r in records for n in r if n not in ("name", "options"))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", *over, *names])
    for record in records:
        options = [record["options"].get(name, "") for name in over]
        values = [record.get(name) for name in names]
        writer.writerow(
            [record["name"], *options, *("" if v is None else v for v in values)]
        )
    return file.getvalue()


def label(options: Mapping[str, str]) -> str:
    """Options in words: `rdpo, learning-rate=1e-05`."""
    named = ("loss", "objective")
    return ", ".join(
        value if name in named else f"{name}={value}"
        for name, value in options.items()
        if not (name == "objective" and value == "none")
    )


def finite(record: Record) -> dict[str, Any]:
    """The record with None for numbers that JSON cannot represent."""
    bad = lambda x: isinstance(x, float) and not math.isfinite(x)
    return {name: None if bad(value) else value for name, value in record.items()}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
