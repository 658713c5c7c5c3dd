"""Two streams in one batch: pairs with traces, and pairs with an empty trace.

Each kind is shuffled and repeated by a Grain iterator of its own, with its own seed,
epoch and state: how many pairs the other kind has changes nothing in its order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax.tree_util
import numpy as np

from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.options import MixOptions
from jaxpref.data.pipeline import BatchShape, collating, iterate, rows_of_process
from jaxpref.errors import InputError

KINDS = ("trace", "empty")


class MixedBatches:
    """An iterator of batches with rows of both streams; made by `mixed_batches`."""

    def __init__(
        self,
        streams: dict[str, Any],
        merge: Callable[..., PreferenceBatch],
    ):
        self._streams, self._merge = streams, merge

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        return self._merge(*(next(stream) for stream in self._streams.values()))

    def get_state(self) -> dict[str, dict[str, int]]:
        """{"trace": {"next_index": step}, "empty": {"next_index": step}}."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, dict[str, int]]) -> None:
        """Goes on where `get_state` was asked, in any number of processes."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])

    def close(self) -> None:
        """Ends the streams' threads and processes."""
        for stream in self._streams.values():
            stream.close()


def mixed_batches(
    pairs: PreferenceDataset,
    *,
    shape: BatchShape,
    batch_size: int,
    empty_share: float = MixOptions.empty_share,
    accumulation: int = 1,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    reference: Mapping[str, np.ndarray] | None = None,
    threads: int = 2,
    prefetch: int = 4,
    processes: int = 0,
) -> MixedBatches:
    """Endless batches with a fixed number of pairs of each kind.

    Every epoch of a kind has each of its pairs once, in an order that depends on its
    number of pairs, seed and epoch only.  Row i of the B rows of a batch holds an empty
    trace exactly where floor((i + 1) n / B) > floor(i n / B), n of them: as evenly as
    can be, so that every micro-batch, process and device has the same mix where
    n / (their number) is whole.  All process counts see the same global batches.

    Args:
      pairs: of `make_mixed_splits`.
      shape: from `batch_shape`.
      batch_size: B, pairs of both kinds a step, over all processes and micro-batches.
      empty_share: n / B before it is rounded; one pair at least is of each kind.
      accumulation: A, micro-batches a step.
      seed: of both orders, which do not depend on each other.
      process_index: which rows are wanted.
      process_count: processes that share every micro-batch.
      reference: float32 [N, K] arrays by name, copied into the batches, or None.
      threads: threads of each stream that collate ahead; 0 collates when asked.
      prefetch: batches kept ready.
      processes: processes of each stream that collate in place of the threads.

    Returns:
      An iterator of PreferenceBatch with the `get_state()` and `set_state(state)` of
      both streams.

    Raises:
      InputError: no pair of one kind, or sizes that do not go together.
    """
    rows = rows_of_process(batch_size, accumulation, process_count)
    if batch_size < 2:
        raise InputError("batch_size 1 has no room for pairs of both kinds; give 2")
    is_empty = empty_rows(batch_size, empty_share)
    mine = np.zeros((accumulation, process_count, rows), bool)
    mine[:, process_index] = True
    mine = mine.ravel()
    streams, places = {}, []
    for kind in KINDS:
        of_kind = is_empty == (kind == "empty")
        indices = np.flatnonzero(pairs.columns["empty_trace"] == (kind == "empty"))
        if not len(indices):
            what = "with a trace" if kind == "trace" else "with an empty trace"
            raise InputError(f"no pair {what} is left to train on; add some")
        # Which of the rows that this kind has are this process's, and where they go.
        wanted = np.flatnonzero(mine[of_kind])
        places.append(np.flatnonzero(of_kind[mine]))
        (uniform,) = hash_uniforms([str(seed)], salt=f"order {kind}")
        dataset = (
            grain.MapDataset.range(len(indices))
            .shuffle(seed=int(uniform * 2**32))
            .repeat()
            .batch(int(of_kind.sum()), drop_remainder=True)
            .map(_taking(indices, wanted))
            .map(collating(pairs, shape, reference))
        )
        streams[kind] = iterate(
            dataset, threads=threads, prefetch=prefetch, processes=processes
        )
    return MixedBatches(streams, _merging(places, accumulation, rows))


def empty_rows(batch_size: int, share: float) -> np.ndarray:
    """Which rows of a batch hold an empty trace, bool [B], as evenly as can be."""
    count = min(max(round(batch_size * share), 1), batch_size - 1)
    bounds = np.arange(batch_size + 1) * count // batch_size
    return np.diff(bounds) > 0


def _taking(indices: np.ndarray, wanted: np.ndarray) -> Callable:
    """The stream's numbers of a batch -> this process's pairs of them, [1, n]."""
    return lambda drawn: indices[drawn[wanted]][None]


def _merging(places: list[np.ndarray], accumulation: int, rows: int) -> Callable:
    """Batches [1, n, ...] of each kind -> one batch [A, R, ...]."""

    def merged(*parts: np.ndarray) -> np.ndarray:
        whole = np.empty((accumulation * rows, *parts[0].shape[2:]), parts[0].dtype)
        for part, place in zip(parts, places):
            whole[place] = part[0]
        return whole.reshape(accumulation, rows, *whole.shape[1:])

    return lambda *batches: jax.tree_util.tree_map(merged, *batches)
