"""Votes on the same two answers in one row, which is scored once for all of them.

Votes on a pair are those of one record, or of records with the same prompt, the same
answers, and a named annotator.  Copies of a record without an annotator are not further
votes.
"""

import dataclasses

import numpy as np

from jaxpref.data.columns import VOTES
from jaxpref.data.dataset import PLACES, PROMPTS, PreferenceDataset

OF_PAIRS = (*PLACES, "empty_trace")
"""Columns that all votes on a pair share."""


def share_votes(*datasets: PreferenceDataset) -> tuple[PreferenceDataset, ...]:
    """The datasets with one row for all votes on a pair, if any pair has several.

    A row keeps the order of the answers, id and place of its first vote.  The column
    `votes` is int8 [M, V]: 1 if a vote prefers the first answer, -1 the second, and 0
    where there is none; V is the largest number of votes in all datasets.  The columns
    that differ between votes, such as `annotator`, are [M, V] too; each vote's numbers
    are those of its own label.

    Args:
      *datasets: pairs, a row for each vote.
    """
    found = [_votes_by_pair(dataset) for dataset in datasets]
    most = max(table.shape[1] for table, _ in found)
    if most == 1:
        return datasets
    return tuple(
        with_votes(dataset, _padded(table, most), swapped)
        for dataset, (table, swapped) in zip(datasets, found)
    )


def with_votes(
    dataset: PreferenceDataset,
    members: np.ndarray,
    swapped: np.ndarray,
) -> PreferenceDataset:
    """The dataset with M rows for its N votes.

    Args:
      dataset: a row for each vote.
      members: int [M, V], the votes of each new row, the first of them in column 0; -1
        for none.
      swapped: bool [N], whether a vote's answers are in the other order than those of
        the votes on its pair where this is false.
    """
    first, real = members[:, 0], members >= 0
    signs = np.where(swapped[members] == swapped[first][:, None], 1, -1)
    columns = {VOTES: np.where(real, signs, 0).astype(np.int8)}
    for name, values in dataset.columns.items():
        if name not in OF_PAIRS:
            nothing = np.asarray(-1 if name == "annotator" else 0, values.dtype)
            columns[name] = np.where(real, values[members], nothing)
    pairs = dataset.take(first)
    return dataclasses.replace(pairs, columns=pairs.columns | columns)


def _padded(members: np.ndarray, count: int) -> np.ndarray:
    more = count - members.shape[1]
    return np.pad(members, ((0, 0), (0, more)), constant_values=-1)


def _votes_by_pair(dataset: PreferenceDataset) -> tuple[np.ndarray, np.ndarray]:
    """The votes on each pair, [M, V], and which have the other order, bool [N]."""
    count = len(dataset)
    columns = dataset.columns
    named = columns["annotator"] >= 0
    prompts = np.sort(np.stack([columns[x] for x in PROMPTS], axis=1), axis=1)
    of_row = np.stack([columns["source"], columns["file_row"]], axis=1)
    several = _repeated(of_row)
    several[named] |= _repeated(np.column_stack([columns["source"], prompts])[named])
    # Only these can be votes on one pair; to hash all texts would take long.
    places = np.flatnonzero(several)
    keys = dataset.take(places).completion_keys()
    pairs, swapped = np.arange(count), np.zeros(count, np.bool_)
    swapped[places] = keys[:, 0] > keys[:, 1]
    ordered = np.sort(keys, axis=1)
    sources = columns["source"][places].tolist()
    first: dict[tuple, int] = {}
    for place, source, key in zip(places.tolist(), sources, ordered.tolist()):
        pairs[place] = first.setdefault((source, *key), place)
    _, rows, sizes = np.unique(pairs, return_inverse=True, return_counts=True)
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum(sizes)
    members = np.full((len(sizes), int(sizes.max(initial=1))), -1)
    members[rows[order], np.arange(count) - np.repeat(ends - sizes, sizes)] = order
    return members, swapped


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Which rows of `keys` [N, columns] occur more than once, bool [N]."""
    _, which, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    return counts[which.reshape(-1)] > 1
