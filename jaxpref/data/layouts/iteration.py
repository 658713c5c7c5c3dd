"""Code shared by the layouts: endless batches, and checks of arguments."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grain
import jax.tree_util
import numpy as np

from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.builder import DatasetBuilder
from jaxpref.data.columns import OF_ANSWERS
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.votes import with_votes
from jaxpref.data.workers import InProcesses
from jaxpref.errors import InputError


def endless(
    make_batch: Callable[[int], PreferenceBatch],
    *,
    threads: int,
    prefetch: int,
    processes: int,
) -> grain.DatasetIterator | InProcesses:
    """An iterator over `make_batch(0)`, `make_batch(1)`, ...

    Args:
      make_batch: makes the batch of a step; pickled if there are processes.
      threads: threads that make batches in advance; 0 makes each batch on demand.
      prefetch: number of batches made in advance.
      processes: processes that make batches instead of threads.

    Returns:
      An iterator whose state is {"next_index": step}.
    """
    dataset = grain.MapDataset.range(sys.maxsize).map(make_batch)
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


def read_ahead(threads: int, prefetch: int) -> grain.ReadOptions:
    """How many batches Grain makes in advance."""
    # Grain's default of 500 elements is meant for examples, not for batches.
    buffer = prefetch if threads else 0
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)


def check_reference(
    dataset: PreferenceDataset, reference: Mapping[str, np.ndarray] | None
) -> None:
    """Raises ValueError unless all tables are float32 [N, K]."""
    expected = (len(dataset), dataset.num_completions)
    for name, table in (reference or {}).items():
        if table.shape != expected or table.dtype != np.float32:
            raise ValueError(
                f"{name} is {table.dtype} {table.shape}, not float32 {expected}"
            )


def check_rows(rows: int, accumulation: int, process_count: int) -> None:
    """Raises InputError unless micro-batches and processes can share the rows."""
    parts = accumulation * process_count
    if rows < 1 or parts < 1 or rows % parts:
        raise InputError(
            f"batch_size {rows} is not a multiple of accumulation {accumulation}"
            f" x {process_count} processes"
        )


def block(rows: int, process_index: int, process_count: int) -> slice:
    """The rows of a micro-batch that this process makes."""
    size = rows // process_count
    return slice(process_index * size, (process_index + 1) * size)


def num_completions(datasets: Iterable[PreferenceDataset]) -> int:
    """K, which must be the same for all non-empty datasets of a run."""
    found = {dataset.num_completions for dataset in datasets if len(dataset)}
    if len(found) != 1:
        raise ValueError(f"pairs of one run have one K and at least one row: {found}")
    return found.pop()


def num_votes(datasets: Iterable[PreferenceDataset]) -> int:
    """V, which must be the same for all non-empty datasets of a run."""
    found = {dataset.num_votes for dataset in datasets if len(dataset)}
    if len(found) != 1:
        raise ValueError(f"pairs of one run have one V, not {found}; see share_votes")
    return found.pop()


def one_pair(count: int, numbers: Iterable[str], votes: int) -> PreferenceDataset:
    """A dataset of one pair, for the fields of its batches.

    Args:
      count: K, its completions.
      numbers: names of its numbers; see `data.columns`.
      votes: V, its votes.
    """
    builder = DatasetBuilder(count)
    blank = {name: [0.0] * count if name in OF_ANSWERS else 0.0 for name in numbers}
    builder.add([0], [[]] * count, id="", columns=blank)
    if votes == 1:
        return builder.build()
    return with_votes(builder.build(), np.zeros((1, votes), int), np.zeros(1, bool))


def with_rows(batch: PreferenceBatch, accumulation: int, rows: int) -> Any:
    """A batch with more rows than this one, made of zeros that take no memory."""
    return jax.tree_util.tree_map(
        lambda x: np.broadcast_to(
            np.zeros((), x.dtype), (accumulation, rows, *x.shape[2:])
        ),
        batch,
    )
