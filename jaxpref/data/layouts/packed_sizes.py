"""The sizes of packed rows and batches, found by packing the steps of a run beforehand.

Packing needs lengths alone, and the order of a run is known before it begins: so its
steps are packed in advance, and a batch has room for the step that needs most.
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
"""Pairs of the steps that are packed in advance, at most."""
AUTO_PAIRS = 4_096
"""Pairs of the steps on which row lengths are compared."""
FEWEST_STEPS = 200
"""Steps that are packed in advance, at least, where a run has so many."""
DEVIATIONS = 3
"""In a run of more steps than are packed in advance, a batch has room for so many
standard deviations of a step's tokens beyond the step that needs most of these."""
GOOD_UTILIZATION = 0.85
"""Share of real tokens down to which micro-batches are made larger."""


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Lengths of the pairs of some steps, each int [steps, B]."""

    tokens: np.ndarray
    predictions: np.ndarray

    def first(self, pairs: int) -> "_Steps":
        count = max(pairs // self.tokens.shape[1], 1)
        return _Steps(self.tokens[:count], self.predictions[:count])


def packed_layout(
    train: PreferenceDataset,
    *others: PreferenceDataset,
    order: Order,
    batch_size: int,
    row_length: int | Literal["auto"] = "auto",
    num_steps: int | None = None,
    accumulation: int = 1,
    shards: int = 1,
    tokens_per_device: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> PackedLayout:
    """The layout whose batches hold exactly `batch_size` pairs of every step.

    Args:
      train: the training data.
      *others: what the run sees beside it (held-out data); rows must hold it too.
      order: of the training pairs.
      batch_size: pairs of a step, over all micro-batches and all processes.
      row_length: T, at least the tokens of any prompt with all its completions; "auto"
        chooses the one that leaves the fewest places empty.
      num_steps: of the run; None if it is not known.
      accumulation: at least so many micro-batches.
      shards: devices that share the rows of a micro-batch.
      tokens_per_device: a micro-batch has more than one row per device, up to so many
        tokens, where that hardly leaves more places empty.
      process_index: this process.
      process_count: how many there are.

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
    answer = max(int(x.completion_lengths.sum(1).max()) for x in datasets)
    steps, is_whole = _simulated(train, order, batch_size, num_steps)
    if row_length == "auto":
        row_length = _best_row_length(steps.first(AUTO_PAIRS), longest, answer, shards)
    size = _row_size(steps, row_length, answer)
    packed = first_fit_decreasing(steps.tokens, steps.predictions, size)
    count = packed.max(1) + 1
    rows = shards * _rows_per_shard(steps, count, row_length, shards, tokens_per_device)
    most = int(count.max())
    if not is_whole:
        deviation = steps.tokens.sum(1).std() / row_length
        most += 1 + int(np.ceil(DEVIATIONS * deviation))
    slots = max(np.bincount(row).max() for row in packed)
    return PackedLayout(
        row_length=row_length,
        predictions=size.predictions,
        slots=int(slots),
        num_completions=iteration.num_completions(datasets),
        rows=rows,
        batch_size=batch_size,
        # A row of its own for each pair is always enough.
        accumulation=max(accumulation, -(-min(most, batch_size) // rows)),
        process_index=process_index,
        process_count=process_count,
        utilization=_utilization(steps, count, row_length, rows),
    )


def _simulated(
    dataset: PreferenceDataset, order: Order, batch_size: int, num_steps: int | None
) -> tuple[_Steps, bool]:
    """Lengths of a run's first steps, and whether these are all of them.

    About one epoch: other epochs have the same pairs in another order.
    """
    most = max(1.1 * len(dataset) / batch_size, FEWEST_STEPS)
    count = max(int(min(most, MOST_PAIRS / batch_size)), 1)
    is_whole = num_steps is not None and num_steps <= count
    if num_steps is not None and is_whole:
        count = max(num_steps, 1)
    drawn = np.stack([order(step, batch_size) for step in range(count)])
    answers = dataset.completion_lengths.sum(1)
    return _Steps(dataset.packed_lengths[drawn], answers[drawn]), is_whole


def _row_size(steps: _Steps, row_length: int, answer: int) -> RowSize:
    # Hardly more room for completions than a row of average pairs asks for: the LM head
    # costs as much as many layers.  Slots cost nothing.
    share = steps.predictions.sum() / steps.tokens.sum()
    predictions = max(answer, int(1.15 * share * row_length))
    return RowSize(
        tokens=row_length,
        predictions=min(-(-predictions // 8) * 8, row_length),
        slots=steps.tokens.shape[1],
    )


def _best_row_length(steps: _Steps, longest: int, answer: int, shards: int) -> int:
    """The shortest row, of those that leave nearly the fewest places empty.

    Multiples of 64, from the longest pair on to twice its length: still longer ones
    cost more attention, and leave more of a step's last rows empty.
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
    """Rows of a device: the most within its tokens that leave few places empty."""
    share = lambda rows: _utilization(steps, count, row_length, shards * rows)
    least = min(GOOD_UTILIZATION, 0.98 * share(1))
    most = max(tokens // row_length, 1)
    return max(n for n in range(1, most + 1) if share(n) >= least)


def _utilization(steps: _Steps, count: np.ndarray, row_length: int, rows: int) -> float:
    """Real tokens for each token computed, micro-batches without pairs left out."""
    computed = (-(-count // rows) * rows * row_length).sum()
    return float(steps.tokens.sum() / computed)
