"""Packed rows: several pairs in one sequence, each prompt once, hardly any padding.

A pair lies in its row as prompt, completion 0, completion 1, and so on.  Completions
continue the prompt's positions; each attends to the prompt and to itself, never to
another one: `segments` say which part of which pair a token is.

Which pairs share a row is decided by best fit in the order of the shuffled stream, with
a look-ahead for pairs that fill gaps: a pure function of the lengths, the seed and the
step, the same on every process, for a number of rows that is fixed when a run begins
(a multiple of its devices and micro-batches).  So the number of pairs in a batch
varies, and losses are divided by what it is.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxpref.data.batch import PreferenceBatch, slot_fields
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.layouts import iteration
from jaxpref.data.samplers import Order
from jaxpref.data.workers import InProcesses
from jaxpref.errors import InputError

LOOK_AHEAD = 8
"""Pairs waiting for a gap, as a multiple of what a batch holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """The sizes of all batches of a run, and this process's share of their rows."""

    row_length: int
    """T, tokens of a row."""
    predictions: int
    """P, predicted tokens of a row."""
    slots: int
    """S, most pairs of a row."""
    num_completions: int
    """K, completions of a prompt."""
    rows: int
    """Rows of a micro-batch, over all processes."""
    batch_size: int
    """Pairs of a step, on average."""
    accumulation: int = 1
    """A, micro-batches of a step."""
    process_index: int = 0
    process_count: int = 1
    """Micro-batch a holds the same pairs for any count; process p gets the p-th block
    of its rows."""

    def __post_init__(self):
        iteration.check_rows(
            self.rows * self.accumulation, self.accumulation, self.process_count
        )

    def of_all_processes(self) -> "PackedLayout":
        """The same batches with the rows of all processes."""
        return dataclasses.replace(self, process_index=0, process_count=1)

    def batches(
        self,
        dataset: PreferenceDataset,
        order: Order,
        *,
        reference: Mapping[str, np.ndarray] | None = None,
        threads: int = 2,
        prefetch: int = 4,
        processes: int = 0,
    ) -> Iterator[PreferenceBatch]:
        """Endless training batches; see `Layout.batches`."""
        iteration.check_reference(dataset, reference)
        order(0, self.batch_size)  # raises what is wrong with the size
        batch = functools.partial(_batch, self, dataset, reference)
        packed = functools.partial(_Packed, dataset, order, self)
        if processes:
            return InProcesses(
                lambda state, index: packed(state, index, processes).map(batch),
                iter(packed()).get_state(),
                lambda _, own: own,
                processes=processes,
                prefetch=prefetch,
            )
        batches = packed().map(batch)
        if threads and prefetch:
            batches = grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=prefetch
            )
        return iter(batches)

    def eval_batches(
        self,
        dataset: PreferenceDataset,
        *,
        indices: np.ndarray | None = None,
        reference: Mapping[str, np.ndarray] | None = None,
        threads: int = 2,
        prefetch: int = 4,
    ) -> Iterator[PreferenceBatch]:
        """Every pair once; see `Layout.eval_batches`."""
        iteration.check_reference(dataset, reference)
        if not len(dataset):
            return
        ahead = window(dataset.packed_lengths, self)
        waiting: collections.deque[int] = collections.deque()
        coming = iter(range(len(dataset)) if indices is None else indices)
        while True:
            waiting.extend(itertools.islice(coming, ahead - len(waiting)))
            if not waiting:
                return
            yield _batch(self, dataset, reference, fill(waiting, dataset, self))

    def abstract_batch(
        self, *, labels: Iterable[str] = (), reference: Iterable[str] = ()
    ) -> Any:
        """The shapes of a batch of all processes; see `Layout.abstract_batch`."""
        dataset = iteration.one_pair(self.num_completions, labels)
        table = np.zeros((1, self.num_completions), np.float32)
        batch = self.collate(
            dataset,
            np.full((1, 1, self.slots), -1),
            reference=dict.fromkeys(reference, table),
        )
        return iteration.with_rows(batch, self.accumulation, self.rows)

    def describe(self) -> str:
        """The shape of every batch in one line."""
        return (
            f"{self.accumulation} x {self.rows} rows of 1 x {self.row_length} tokens, "
            f"predictions {self.predictions}, pair slots {self.slots}"
        )

    def overhead(self, dataset: PreferenceDataset) -> float:
        """Tokens that are computed for each token of the dataset, on average."""
        tokens = self.accumulation * self.rows * self.row_length / self.batch_size
        return tokens / dataset.packed_lengths.mean()

    def collate(
        self,
        dataset: PreferenceDataset,
        indices: np.ndarray,
        *,
        reference: Mapping[str, np.ndarray] | None = None,
    ) -> PreferenceBatch:
        """Lays pairs out in packed rows.

        Args:
          dataset: where the tokens are.
          indices: int [A, R, S]; the pairs of each row, -1 in empty slots.
          reference: float32 [N, K] arrays of all pairs by name, or None.

        Returns:
          The batch of numpy arrays [A, R, ...] with Q = 1 sequence a row.
        """
        flat = indices.reshape(-1, self.slots)
        blank = lambda size, value=0: np.full((len(flat), 1, size), value, np.int32)
        arrays = {
            "tokens": blank(self.row_length),
            "positions": blank(self.row_length),
            "segments": blank(self.row_length, -1),
            "predictors": blank(self.predictions),
            "targets": blank(self.predictions),
            "completions": blank(self.predictions, -1),
            "lengths": np.zeros((len(flat), 1), np.int32),
        }
        for row, slots in enumerate(flat):
            own = {name: array[row, 0] for name, array in arrays.items()}
            arrays["lengths"][row] = _write_row(dataset, slots, own)
        shape = indices.shape[:2]
        return PreferenceBatch(
            **{name: x.reshape(*shape, *x.shape[1:]) for name, x in arrays.items()},
            **slot_fields(dataset, indices, reference),
        )


def packed_layout(
    *datasets: PreferenceDataset,
    row_length: int,
    batch_size: int,
    accumulation: int = 1,
    shards: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    multiple: int = 8,
) -> PackedLayout:
    """Sizes for which a batch holds about `batch_size` pairs, with little room unused.

    Args:
      *datasets: all that a run will see (train and held-out).
      row_length: T, at least the tokens of any prompt with all its completions.
      batch_size: pairs a batch shall hold on average.
      accumulation: A, micro-batches of a step.
      shards: devices that share the rows of a micro-batch.
      process_index: this process.
      process_count: how many there are.
      multiple: P is a multiple of this.

    Raises:
      InputError: if a pair is longer than a row, or so many rows hold far more pairs.
    """
    filled = [x for x in datasets if len(x)]
    tokens = np.concatenate([x.packed_lengths for x in filled])
    answers = np.concatenate([x.completion_lengths.sum(axis=1) for x in filled])
    if tokens.max() > row_length:
        raise InputError(
            f"row_length {row_length}: a pair has {tokens.max()} tokens, its prompt "
            "and both answers; give at least as many, or a smaller max_length"
        )
    # Hardly more room for answers than a row of average pairs asks for: the LM head
    # costs as much as many layers.  Slots are free, so there are a fifth more.
    share = answers.sum() / tokens.sum()
    predictions = max(int(answers.max()), int(1.05 * share * row_length))
    predictions = min(-(-predictions // multiple) * multiple, row_length)
    slots = max(1, int(np.ceil(1.2 * row_length / tokens.mean())))
    held = 0.96 * row_length / tokens.mean()
    parts = accumulation * shards
    rows = max(round(batch_size / held / parts), 1) * parts
    if rows * held > max(1.5 * batch_size, batch_size + held):
        raise InputError(
            f"row_length {row_length}: {rows} rows, one at least for each device and "
            f"micro-batch, hold about {rows * held:.0f} pairs, and batch_size is "
            f"{batch_size}; give shorter rows or a larger batch"
        )
    return PackedLayout(
        row_length=row_length,
        predictions=predictions,
        slots=slots,
        num_completions=iteration.num_completions(filled),
        rows=rows // accumulation,
        batch_size=batch_size,
        accumulation=accumulation,
        process_index=process_index,
        process_count=process_count,
    )


def _write_row(
    dataset: PreferenceDataset, slots: np.ndarray, row: dict[str, np.ndarray]
) -> int:
    """Writes the pairs of `slots` into the arrays of one row; returns its length."""
    count = dataset.num_completions
    at = predicted = 0
    for slot, index in enumerate(slots):
        if index < 0:
            continue
        prompt = dataset.prompt(index)
        last = at + len(prompt) - 1
        parts = [prompt, *(dataset.completion(index, k) for k in range(count))]
        for part, text in enumerate(parts):
            inside = slice(at, at + len(text))
            row["tokens"][inside] = text
            first = len(prompt) if part else 0
            row["positions"][inside] = np.arange(first, first + len(text))
            row["segments"][inside] = (1 + count) * slot + part
            if part and len(text):
                own = slice(predicted, predicted + len(text))
                # The prompt's last token predicts the first of each completion.
                row["predictors"][own] = np.arange(at - 1, at - 1 + len(text))
                row["predictors"][predicted] = last
                row["targets"][own] = text
                row["completions"][own] = slot * count + part - 1
                predicted += len(text)
            at += len(text)
    return at


def _batch(
    layout: PackedLayout,
    dataset: PreferenceDataset,
    reference: Mapping[str, np.ndarray] | None,
    rows: Sequence[Sequence[int]],
) -> PreferenceBatch:
    """This process's rows of the batch whose rows hold these pairs."""
    indices = np.full((len(rows), layout.slots), -1)
    for row, held in enumerate(rows):
        indices[row, : len(held)] = held
    own = iteration.block(layout.rows, layout.process_index, layout.process_count)
    indices = indices.reshape(layout.accumulation, -1, layout.slots)[:, own]
    return layout.collate(dataset, indices, reference=reference)


def fill(
    waiting: collections.deque[int], dataset: PreferenceDataset, layout: PackedLayout
) -> list[list[int]]:
    """Takes pairs out of `waiting` for one batch: the pairs of each row.

    In order, each into the row with the least room that still holds it; pairs that fit
    nowhere stay, in order.  The first always fits, so no pair waits forever.
    """
    tokens = dataset.packed_lengths
    answers = dataset.completion_lengths.sum(axis=1)
    count = layout.rows * layout.accumulation
    rows: list[list[int]] = [[] for _ in range(count)]
    room = np.full(count, layout.row_length)
    answer_room = np.full(count, layout.predictions)
    slots = np.full(count, layout.slots)
    left = []
    for _ in range(len(waiting)):
        index = waiting.popleft()
        after = room - tokens[index]
        fits = (after >= 0) & (answer_room >= answers[index]) & (slots > 0)
        if not fits.any():
            left.append(index)
            continue
        row = int(np.argmin(np.where(fits, after, np.iinfo(np.int64).max)))
        rows[row].append(int(index))
        room[row] -= tokens[index]
        answer_room[row] -= answers[index]
        slots[row] -= 1
    waiting.extend(left)
    return rows


def window(tokens: np.ndarray, layout: PackedLayout) -> int:
    """Pairs that are looked at for a batch."""
    held = layout.rows * layout.accumulation * layout.row_length / tokens.mean()
    return int(np.ceil((1 + LOOK_AHEAD) * held))


class _Packed(grain.IterDataset):
    """Rows of pair numbers, a batch an element.

    From a saved state on, where one is given, each `every`-th batch from `first`.
    """

    def __init__(self, dataset, order, layout, state=None, first=0, every=1):
        super().__init__(())
        self._what, self._start = (dataset, order, layout), state
        self._part = first, every

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PackedIterator(*self._what, *self._part)
        if self._start is not None:
            iterator.set_state(self._start)
        return iterator


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, dataset, order, layout, first, every):
        super().__init__(())
        self._dataset, self._order, self._layout = dataset, order, layout
        self._ahead = window(dataset.packed_lengths, layout)
        self._next, self._drawn = 0, (-1, None)
        self._waiting: collections.deque[int] = collections.deque()
        self._others, self._every = first, every

    def __next__(self) -> list[list[int]]:
        # Before and not after its own: the state is then that of the whole stream.
        for _ in range(self._others):
            self._rows()
        self._others = self._every - 1
        return self._rows()

    def _rows(self) -> list[list[int]]:
        size = self._layout.batch_size
        while len(self._waiting) < self._ahead:
            step, place = divmod(self._next, size)
            if self._drawn[0] != step:
                self._drawn = step, self._order(step, size)
            self._waiting.append(int(self._drawn[1][place]))
            self._next += 1
        return fill(self._waiting, self._dataset, self._layout)

    def get_state(self) -> dict:
        return {"next_index": self._next, "waiting": list(self._waiting)}

    def set_state(self, state: dict) -> None:
        self._next = state["next_index"]
        self._waiting = collections.deque(state["waiting"])
