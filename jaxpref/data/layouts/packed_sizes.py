"""The sizes of packed rows and batches, determined by packing the steps in advance.

Packing only needs lengths, and the order of a run is known before it begins.  The steps
are packed in advance, so that a batch has room for the step that needs the most.
"""

import dataclasses
from typing import Literal

import numpy as np

from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.layouts import iteration
from jaxpref.data.layouts.bins import RowSize, first_fit_decreasing
from jaxpref.data.layouts.packed import PackedLayout
from jaxpref.data.samplers import Order
from jaxpref.errors import InputError

MOST_PAIRS = 20_000
"""Maximum number of pairs to pack in advance."""
AUTO_PAIRS = 4_096
"""Number of pairs used to compare row lengths."""
FEWEST_STEPS = 200
"""Minimum number of steps to pack in advance, if the run has as many."""
DEVIATIONS = 3
"""Margin for runs with more steps than are packed in advance: standard deviations of
a step's tokens, beyond the largest step packed."""
GOOD_UTILIZATION = 0.85
"""Micro-batches are enlarged as long as this share of their tokens is real."""


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The lengths of the pairs of several steps, each int [steps, B]."""

    tokens: np.ndarray
    predictions: np.ndarray

    def first(self, pairs: int) -> "_Steps":
        count = max(pairs // self.tokens.shape[1], 1)
        return _Steps(self.tokens[:count], self.predictions[:count])


def packed_layout(
    train: PreferenceDataset,
    *others: PreferenceDataset,
    order: Order,
    sizes_for: Order | None = None,
    batch_size: int,
    row_length: int | Literal["auto"] = "auto",
    num_steps: int | None = None,
    accumulation: int = 1,
    shards: int = 1,
    tokens_per_device: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> PackedLayout:
    """A layout whose batches hold exactly the `batch_size` pairs of their step.

    Args:
      train: the training data.
      *others: other data of the run (held-out data), which must fit into rows too.
      order: the order of the training pairs.
      sizes_for: an order for which to choose the row length and the rows of a
        micro-batch (default: `order`).  Runs that differ in their order then have the
        same rows, and can share scores.
      batch_size: pairs per step, over all micro-batches and processes.
      row_length: T, at least the tokens of any prompt with all its completions; "auto"
        chooses the one with the least padding.
      num_steps: steps of the run; None if unknown.
      accumulation: minimum number of micro-batches, which are made smaller to match.
      shards: devices that share the rows of a micro-batch.
      tokens_per_device: a micro-batch may have several rows per device, up to this many
        tokens, if that adds little padding.
      process_index: index of this process.
      process_count: number of processes.

    Raises:
      InputError: if a prompt with its completions is longer than a row.
    """
    datasets = [x for x in (train, *others) if len(x)]
    longest = max(int(x.packed_lengths.max()) for x in datasets)
    if row_length != "auto" and longest > row_length:
        raise InputError(
            f"row_length {row_length}: a prompt with all its completions has {longest} "
            "tokens; give at least as many, or a smaller max_length"
        )
    answer = max(int(x.target_lengths.sum(1).max()) for x in datasets)
    chosen_for = order if sizes_for is None else sizes_for
    steps, is_whole = _simulated(train, chosen_for, batch_size, num_steps)
    if row_length == "auto":
        row_length = _best_row_length(steps.first(AUTO_PAIRS), longest, answer, shards)
    size = _row_size(steps, row_length, answer)
    packed = first_fit_decreasing(steps.tokens, steps.predictions, size)
    count = packed.max(1) + 1
    rows = shards * _rows_per_shard(steps, count, row_length, shards, tokens_per_device)
    most = _most_rows(steps, count, row_length, is_whole)
    if accumulation > 1:  # smaller micro-batches, not just more of them
        rows = min(rows, shards * -(-most // (accumulation * shards)))
    if chosen_for is not order:
        steps, is_whole = _simulated(train, order, batch_size, num_steps)
        packed = first_fit_decreasing(steps.tokens, steps.predictions, size)
        count = packed.max(1) + 1
        most = _most_rows(steps, count, row_length, is_whole)
    slots = max(np.bincount(row).max() for row in packed)
    return PackedLayout(
        row_length=row_length,
        predictions=size.predictions,
        slots=int(slots),
        num_completions=iteration.num_completions(datasets),
        num_votes=iteration.num_votes(datasets),
        rows=rows,
        batch_size=batch_size,
        # One row per pair is always enough.
        accumulation=max(accumulation, -(-min(most, batch_size) // rows)),
        process_index=process_index,
        process_count=process_count,
        utilization=_utilization(steps, count, row_length, rows),
    )


def _most_rows(
    steps: _Steps, count: np.ndarray, row_length: int, is_whole: bool
) -> int:
    """The most rows that a step needs, with a margin if not all steps are known."""
    most = int(count.max())
    if not is_whole:
        deviation = steps.tokens.sum(1).std() / row_length
        most += 1 + int(np.ceil(DEVIATIONS * deviation))
    return most


def _simulated(
    dataset: PreferenceDataset, order: Order, batch_size: int, num_steps: int | None
) -> tuple[_Steps, bool]:
    """Lengths of a run's first steps, and whether these are all its steps.

    About one epoch is enough, since other epochs only reorder the pairs.
    """
    most = max(1.1 * len(dataset) / batch_size, FEWEST_STEPS)
    count = max(int(min(most, MOST_PAIRS / batch_size)), 1)
    is_whole = num_steps is not None and num_steps <= count
    if num_steps is not None and is_whole:
        count = max(num_steps, 1)
    drawn = np.stack([order(step, batch_size) for step in range(count)])
    answers = dataset.target_lengths.sum(1)
    return _Steps(dataset.packed_lengths[drawn], answers[drawn]), is_whole


def _row_size(steps: _Steps, row_length: int, answer: int) -> RowSize:
    # Little more room for completions than average pairs need, since the LM head costs
    # as much as many layers.  Slots cost nothing.
    share = steps.predictions.sum() / steps.tokens.sum()
    predictions = max(answer, int(1.15 * share * row_length))
    return RowSize(
        tokens=row_length,
        predictions=min(-(-predictions // 8) * 8, row_length),
        slots=steps.tokens.shape[1],
    )


def _best_row_length(steps: _Steps, longest: int, answer: int, shards: int) -> int:
    """The shortest row length whose padding is close to the least possible.

    Tries multiples of 64, from the longest pair to twice its length.  Longer rows cost
    more attention, and leave more of a step's last rows empty.
    """
    shortest = -(-longest // 64)
    found = {}
    for row_length in range(64 * shortest, 64 * (2 * shortest) + 1, 64):
        size = _row_size(steps, row_length, answer)
        packed = first_fit_decreasing(steps.tokens, steps.predictions, size)
        count = packed.max(1) + 1
        found[row_length] = _utilization(steps, count, row_length, shards)
    best = max(found.values())
    return next(length for length, share in found.items() if share >= best - 0.005)


def _rows_per_shard(
    steps: _Steps, count: np.ndarray, row_length: int, shards: int, tokens: int
) -> int:
    """Rows per device: as many as fit into `tokens` without much padding."""
    share = lambda rows: _utilization(steps, count, row_length, shards * rows)
    least = min(GOOD_UTILIZATION, 0.98 * share(1))
    most = max(tokens // row_length, 1)
    return max(n for n in range(1, most + 1) if share(n) >= least)


def _utilization(steps: _Steps, count: np.ndarray, row_length: int, rows: int) -> float:
    """Share of computed tokens that are real; empty micro-batches are not computed."""
    computed = (-(-count // rows) * rows * row_length).sum()
    return float(steps.tokens.sum() / computed)
