"""Accuracy by group: records with the same value of a field, or alike in length."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxpref.data import PreferenceDataset, Source
from jaxpref.data.columns import field_value
from jaxpref.data.records.view import Everything, View
from jaxpref.errors import InputError, closest
from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.metrics import (
    brier_score,
    expected_calibration_error,
    wilson_interval,
)

ANNOTATOR, LENGTH_BIN, CHES_BIN = "annotator", "length-bin", "ches-bin"
"""Groups that are not read from a field of the file's own."""
BINS = 5
"""Bins of CHES scores."""
NONE = "none"
"""The group of records without a value."""
MOST = 1000
"""Maximum number of groups of a field; more are probably not groups."""

Groups = dict[str, dict[str, float | None]]
"""Statistics by group."""


def group_values(
    source: Source, records: PreferenceDataset, field: str, name: str
) -> list[str]:
    """The group of each record.

    Args:
      source: the records in the file that `records` were read from.
      records: N records.
      field: `annotator`, `length-bin` (of pairs), or a field, which may be dotted.
      name: names the file, for errors.

    Raises:
      InputError: if no record has the field, if it has an object or more than `MOST`
        values, or for bins of anything but pairs.
    """
    if field == LENGTH_BIN:
        if records.num_completions != 2:
            raise InputError(
                f"--by {field}: bins differences in length between the two answers of "
                f"a pair, but {name} is not read as pairs; pass --kind pairs or leave "
                "it out"
            )
        return length_bins(np.subtract(*records.completion_lengths.T))
    if field == ANNOTATOR and records.annotator_names:
        names = (*records.annotator_names, NONE)  # unknown ones are -1
        return [names[n] for n in records.columns["annotator"]]
    found = [_value(source, int(row), field) for row in records.columns["row"].tolist()]
    if set(found) == {None}:
        fields = list(record_fields(source[int(records.columns["row"][0])]))
        raise InputError(
            f"--by {field}: no record of {name} has this field"
            f"{closest(field, fields)}; records have {', '.join(fields)[:200]}"
        )
    if (count := len(set(found))) > MOST:
        raise InputError(
            f"--by {field}: {count:,} different values in {name}, more than {MOST:,}; "
            "name a field that groups records"
        )
    return [NONE if x is None else x for x in found]


def length_bins(differences: Int[np.ndarray, " pairs"]) -> list[str]:
    """The bin of each pair, by the length of the chosen answer minus the other.

    Pairs whose chosen answer is longer are divided after the median of their
    differences, and so are those whose chosen answer is shorter.  Equal lengths are a
    bin of their own.

    Args:
      differences: in tokens; [pairs].

    Returns:
      For each pair, `12 or more`, `1 to 11`, `0`, `-11 to -1`, or `-12 or less`, with
      numbers that depend on the data.
    """
    sizes = np.abs(differences)
    names = np.full(len(sizes), "0", object)
    longer, shorter = np.asarray(differences) > 0, np.asarray(differences) < 0
    if longer.any():
        last = int(np.median(sizes[longer]))
        names[longer] = f"1 to {last}"
        names[longer & (sizes > last)] = f"{last + 1} or more"
    if shorter.any():
        last = int(np.median(sizes[shorter]))
        names[shorter] = f"-{last} to -1"
        names[shorter & (sizes > last)] = f"-{last + 1} or less"
    return names.tolist()


def equal_bins(values: Float[np.ndarray, " pairs"]) -> list[str]:
    """The bin of each pair: `BINS` bins with equal counts, named by their ranges.

    Equal values share a bin, so that there may be fewer.  Names have three digits, or
    as many as distinguish the bins.
    """
    ends = np.quantile(values, np.arange(1, BINS) / BINS, method="lower")
    index = np.searchsorted(np.unique(ends), values, side="left")
    bins = [np.asarray(values)[index == n] for n in np.unique(index)]
    names: list[str] = []
    for digits in range(3, 18):  # 17 tell any two float64 apart
        names = [f"{x.min():.{digits}g} to {x.max():.{digits}g}" for x in bins]
        if len(set(names)) == len(names):
            break
    of_bin = dict(zip(np.unique(index), names, strict=True))
    return [of_bin[n] for n in index]


def by_group(
    groups: Sequence[str],
    hits: Float[np.ndarray, " records"],
    prompts: Int[np.ndarray, " records"],
    margins: Float[np.ndarray, " pairs"] | None = None,
) -> Groups:
    """Statistics of each group.

    Args:
      groups: the group of each record.
      hits: how right the rewards are about each record, from 0 to 1; [records].
      prompts: a number that records of the same prompt share; [records].
      margins: of pairs, the reward of the chosen answer minus that of the other, in
        nats; [pairs].

    Returns:
      By group, in order: `count`; `accuracy`, the mean of `hits`, with the ends of its
      95% interval, `low` and `high`: Wilson's for pairs, and a bootstrap over prompts
      otherwise; and of pairs `margin` (the mean), `ece` and `brier`.
    """
    groups_of, found = np.asarray(groups, object), {}
    for name in sorted(set(groups), key=_order):
        own = groups_of == name
        if margins is None:
            mean = lambda weights, x=hits[own]: {"a": weights @ x / weights.sum()}
            share, low, high = prompt_bootstrap(mean, prompts[own]).values()
            found[name] = _interval(own, share, low, high)
        else:
            share = float(np.mean(hits[own]))
            low, high = wilson_interval(share, int(own.sum()))
            found[name] = _interval(own, share, low, high) | {
                "margin": float(np.mean(margins[own])),
                "ece": expected_calibration_error(margins[own]),
                "brier": brier_score(margins[own]),
            }
    return found


def table_lines(field: str, groups: Groups) -> list[str]:
    """The groups of a field as lines of a printed table."""
    columns = list(next(iter(groups.values())))
    width = max(len(field), *map(len, groups)) if groups else len(field)
    lines = [f"{field:{width}}  " + "  ".join(f"{x:>8}" for x in columns)]
    for name, one in groups.items():
        cells = (
            f"{x:>8}" if isinstance(x, int) else f"{x:>8.4f}" for x in one.values()
        )
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return lines


def _interval(
    own: np.ndarray, share: float, low: float, high: float
) -> dict[str, float | None]:
    return {"count": int(own.sum()), "accuracy": share, "low": low, "high": high}


def record_fields(record: Any) -> Mapping[str, Any]:
    """All fields of a record, also those of the record in the file."""
    if isinstance(record, View):
        return Everything(record, record.origin.record)
    return record if isinstance(record, Mapping) else {}


def _value(source: Source, row: int, field: str) -> str | None:
    """The value of a field as text; None if there is none."""
    value = field_value(record_fields(source[row]), field)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, Mapping | list):
        raise InputError(
            f"{source.location(row)}: field '{field}' holds {type(value).__name__}, "
            "which groups nothing; name a field of it, such as --by "
            f"{field}.{next(iter(value), 0)}"
        )
    return json.dumps(value)


def _order(name: str) -> tuple:
    """Names by the number that they begin with, and before other texts."""
    try:
        return 0, float(name.split()[0]), name
    except (ValueError, IndexError):
        return 1, 0.0, name
