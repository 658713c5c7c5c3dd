"""From pairs to batches: Grain shuffles and batches, each process takes its share.

The order of examples is a pure function of (seed, step): tokenising, dropping and noise
were done in the plan, so nothing here can change how many examples there are.  The
saved state of an iterator is one integer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import grain
import numpy as np

from jaxpref.data.batch import PreferenceBatch, slot_fields
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.workers import InProcesses
from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static sizes of a row: every batch of a run has them, so a step compiles once."""

    sequence_length: int
    """T, tokens of a sequence."""
    predictions: int
    """P, predicted tokens of a sequence."""
    sides: int
    """K, completions of a pair; in the padded layout also Q, sequences of a row."""


def batch_shape(
    *pairs: PreferenceDataset, length_multiple: int = 8, prediction_multiple: int = 8
) -> BatchShape:
    """The smallest shape that holds every sequence of `pairs`, rounded up.

    Args:
      *pairs: all the pairs a run will see (train and held-out).
      length_multiple: T is a multiple of this.
      prediction_multiple: P is a multiple of this.
    """
    filled = [p for p in pairs if len(p)]
    sides = {p.num_completions for p in filled}
    if len(sides) != 1:
        raise ValueError(f"pairs of one run have one K and at least one row: {sides}")
    longest = max(p.longest for p in filled)
    answer = max(int(p.completion_lengths.max()) for p in filled)
    (num_sides,) = sides
    return BatchShape(
        sequence_length=-(-longest // length_multiple) * length_multiple,
        predictions=-(-answer // prediction_multiple) * prediction_multiple,
        sides=num_sides,
    )


def collate(
    pairs: PreferenceDataset,
    indices: np.ndarray,
    *,
    shape: BatchShape,
    reference: Mapping[str, np.ndarray] | None = None,
) -> PreferenceBatch:
    """Lay pairs out in rows, one pair a row, one completion a sequence.

    Args:
      pairs: where the tokens are.
      indices: int [A, R]; the pair of each row, -1 for an empty row.
      shape: T, P and K of the batch.
      reference: float32 [N, K] arrays of all pairs by name, or None.

    Returns:
      The batch of numpy arrays [A, R, ...]; empty rows are zeros with pair -1.
    """
    rows, sides = indices.size, shape.sides
    flat = indices.reshape(rows)
    tokens = np.zeros((rows, sides, shape.sequence_length), np.int32)
    lengths = np.zeros((rows, sides), np.int32)
    predictors = np.zeros((rows, sides, shape.predictions), np.int32)
    targets = np.zeros_like(predictors)
    completions = np.full_like(predictors, -1)
    for row in np.flatnonzero(flat >= 0):
        prompt = pairs.prompt(flat[row])
        for side in range(sides):
            completion = pairs.completion(flat[row], side)
            start, size = len(prompt), len(completion)
            tokens[row, side, :start] = prompt
            tokens[row, side, start : start + size] = completion
            lengths[row, side] = start + size
            # The state at position t predicts token t + 1.
            predictors[row, side, :size] = np.arange(start - 1, start - 1 + size)
            targets[row, side, :size] = completion
            completions[row, side, :size] = side

    def shaped(array: np.ndarray, *axes: int) -> np.ndarray:
        return array.reshape(*indices.shape, *axes)

    return PreferenceBatch(
        tokens=shaped(tokens, sides, shape.sequence_length),
        lengths=shaped(lengths, sides),
        predictors=shaped(predictors, sides, shape.predictions),
        targets=shaped(targets, sides, shape.predictions),
        completions=shaped(completions, sides, shape.predictions),
        **slot_fields(pairs, indices[..., None], reference),
    )


def batches(
    pairs: PreferenceDataset,
    *,
    shape: BatchShape,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    reference: Mapping[str, np.ndarray] | None = None,
    threads: int = 2,
    prefetch: int = 4,
    processes: int = 0,
) -> grain.DatasetIterator | InProcesses:
    """Endless training batches in an order that depends on `seed` and step only.

    Pairs are shuffled anew each epoch; an epoch that does not divide into batches runs
    on into the next, so every pair is seen equally often.

    Args:
      pairs: the training pairs of a plan.
      shape: from `batch_shape`.
      batch_size: pairs of a step, over all micro-batches and all processes.
      accumulation: A, micro-batches of a step.
      seed: of the order; another seed gives an unrelated order in every epoch.
      process_index: this process.
      process_count: how many there are.  Micro-batch a holds the same pairs for any
        count; process p gets the p-th block of its rows.
      reference: float32 [N, K] arrays by name, copied into the batches, or None.
      threads: threads that collate ahead; 0 collates when asked.
      prefetch: batches kept ready.
      processes: processes that collate in place of the threads, see `InProcesses`.

    Returns:
      An iterator of PreferenceBatch with `get_state()` = {"next_index": step} and
      `set_state(state)`.
    """
    micro = rows_of_process(batch_size, accumulation, process_count)
    dataset = (
        shuffled(pairs, seed)
        .batch(batch_size, drop_remainder=True)
        .map(_share(accumulation, micro, process_index))
        .map(collating(pairs, shape, reference))
    )
    return iterate(dataset, threads=threads, prefetch=prefetch, processes=processes)


def iterate(
    dataset: grain.MapDataset, *, threads: int, prefetch: int, processes: int
) -> grain.DatasetIterator | InProcesses:
    """An iterator over an endless data set, whose state is {"next_index": step}."""
    if not processes:
        return iter(dataset.to_iter_dataset(read_ahead(threads, prefetch)))

    def part(state: dict[str, int], index: int) -> grain.IterDataset:
        own = dataset[state["next_index"] + index :: processes]
        return own.to_iter_dataset(read_ahead(0, 0))

    return InProcesses(
        part,
        {"next_index": 0},
        lambda state, _: {"next_index": state["next_index"] + 1},
        processes=processes,
        prefetch=prefetch,
    )


def shuffled(pairs: PreferenceDataset, seed: int) -> grain.MapDataset:
    """Numbers of pairs without end, every epoch in an order of its own."""
    if not len(pairs):
        raise InputError("no pair is left to train on")
    # Grain gives epoch e the seed `seed + e`: neighbouring seeds would share epochs.
    (uniform,) = hash_uniforms([str(seed)], salt="order")
    order = grain.MapDataset.range(len(pairs)).shuffle(seed=int(uniform * 2**32))
    return order.repeat()


def eval_batches(
    pairs: PreferenceDataset,
    *,
    shape: BatchShape,
    batch_size: int,
    accumulation: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    reference: Mapping[str, np.ndarray] | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset:
    """Every pair once, in order; the last batch is padded with empty rows.

    Arguments as for `batches`.  Every process gets the same number of batches.

    Returns:
      An iterable of ceil(N / batch_size) batches; empty rows have pair -1 and weight 0.
    """
    micro = rows_of_process(batch_size, accumulation, process_count)
    steps = -(-len(pairs) // batch_size)

    def indices(step: int) -> np.ndarray:
        flat = np.arange(step * batch_size, (step + 1) * batch_size)
        return np.where(flat < len(pairs), flat, -1)

    dataset = (
        grain.MapDataset.range(steps)
        .map(indices)
        .map(_share(accumulation, micro, process_index))
        .map(collating(pairs, shape, reference))
    )
    return dataset.to_iter_dataset(read_ahead(threads, prefetch))


def read_ahead(threads: int, prefetch: int) -> grain.ReadOptions:
    """How far Grain collates ahead."""
    # Grain's default of 500 elements ahead is meant for examples, not for batches.
    buffer = prefetch if threads else 0
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)


def rows_of_process(batch_size: int, accumulation: int, process_count: int) -> int:
    """Rows of one micro-batch in one process."""
    parts = accumulation * process_count
    if batch_size < 1 or parts < 1 or batch_size % parts:
        raise InputError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation}"
            f" x {process_count} processes"
        )
    return batch_size // parts


def _share(accumulation: int, rows: int, process_index: int) -> Callable:
    """This process's block of every micro-batch: int [batch] -> int [A, R]."""
    block = slice(process_index * rows, (process_index + 1) * rows)
    return lambda indices: indices.reshape(accumulation, -1)[:, block]


def collating(
    pairs: PreferenceDataset,
    shape: BatchShape,
    reference: Mapping[str, np.ndarray] | None,
) -> Callable:
    """`collate` of indices alone, its reference checked."""
    expected = (len(pairs), pairs.num_completions)
    for name, table in (reference or {}).items():
        if table.shape != expected or table.dtype != np.float32:
            raise ValueError(
                f"{name} is {table.dtype} {table.shape}, not float32 {expected}"
            )
    return functools.partial(collate, pairs, shape=shape, reference=reference)
