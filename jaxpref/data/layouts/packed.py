"""Packed rows: several pairs in one sequence, each prompt once, with little padding.

In its row, a pair is laid out as prompt, completion 0, completion 1, and so on.
Completions continue the prompt's positions.  Each attends to the prompt and to itself,
never to another completion; `segments` gives the pair and part of each token.  A prompt
of one completion alone comes before it, in the same part.

A batch holds exactly the pairs of its step, the same ones as a padded batch.  They are
packed by first fit, longest first: a pure function of the lengths, the seed and the
step, and the same on every process.  Micro-batches that a step does not need are empty
and come last, so the train step can skip them.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data.batch import PreferenceBatch, slot_fields
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.layouts import iteration
from jaxpref.data.layouts.bins import RowSize, best_fit, first_fit_decreasing
from jaxpref.data.samplers import Order
from jaxpref.errors import InputError

LOOK_AHEAD = 8
"""How far evaluation looks ahead for pairs that fill gaps, in batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """The sizes of a run's batches, and this process's share of their rows."""

    row_length: int
    """T, tokens of a row."""
    predictions: int
    """P, predicted tokens of a row."""
    slots: int
    """S, maximum number of pairs in a row."""
    num_completions: int
    """K, completions of a prompt."""
    rows: int
    """Rows of a micro-batch, over all processes."""
    batch_size: int
    """Pairs per step, over all micro-batches and processes."""
    num_votes: int = 1
    """V, maximum number of votes on a pair."""
    accumulation: int = 1
    """A, micro-batches per step, enough for every step."""
    process_index: int = 0
    process_count: int = 1
    """The pairs of a micro-batch do not depend on this; process p makes the p-th block
    of its rows."""
    utilization: float = 1.0
    """Expected share of computed tokens that are not padding."""

    def __post_init__(self):
        iteration.check_rows(
            self.rows * self.accumulation, self.accumulation, self.process_count
        )

    @property
    def row_size(self) -> RowSize:
        """The capacity of a row."""
        return RowSize(self.row_length, self.predictions, self.slots)

    def of_all_processes(self) -> "PackedLayout":
        """The same layout with the rows of all processes."""
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
        order(0, self.batch_size)  # raises an error if the size is invalid
        lengths = (dataset.packed_lengths, dataset.target_lengths.sum(1))

        # A closure, since Grain prints functions, and would print a partial's arrays.
        def make_batch(step: int) -> PreferenceBatch:
            indices = order(step, self.batch_size)
            tokens, predictions = (values[indices][None] for values in lengths)
            (packed,) = first_fit_decreasing(tokens, predictions, self.row_size)
            self._check(step, int(packed.max()) + 1)
            rows: list[list[int]] = [[] for _ in range(self.accumulation * self.rows)]
            for index, row in zip(indices.tolist(), packed.tolist()):
                rows[row].append(index)
            return self._batch(dataset, rows, reference)

        return iteration.endless(
            make_batch, threads=threads, prefetch=prefetch, processes=processes
        )

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
        tokens, predictions = dataset.packed_lengths, dataset.target_lengths.sum(1)
        count = self.accumulation * self.rows
        ahead = int((1 + LOOK_AHEAD) * count * self.row_length / tokens.mean()) + 1
        waiting: collections.deque[int] = collections.deque()
        coming = iter(range(len(dataset)) if indices is None else indices)
        while True:
            waiting.extend(itertools.islice(coming, ahead - len(waiting)))
            if not waiting:
                return
            rows = best_fit(waiting, tokens, predictions, self.row_size, count)
            yield self._batch(dataset, rows, reference)

    def abstract_batch(
        self, *, numbers: Iterable[str] = (), reference: Iterable[str] = ()
    ) -> Any:
        """The shapes of a batch of all processes; see `Layout.abstract_batch`."""
        dataset = iteration.one_pair(self.num_completions, numbers, self.num_votes)
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
            f"{self.batch_size} pairs per step, packed: at most {self.accumulation} x "
            f"{self.rows} rows of {self.row_length} tokens, about "
            f"{self.utilization:.0%} of them real"
        )

    def rounding(self) -> str:
        """The parts of the shape that affect rounding; see `Layout.rounding`."""
        return f"{self.rows} packed rows of {self.row_length} tokens"

    def overhead(self, dataset: PreferenceDataset) -> float:
        """Number of tokens computed per token of the run's steps."""
        return 1 / self.utilization

    def collate(
        self,
        dataset: PreferenceDataset,
        indices: np.ndarray,
        *,
        reference: Mapping[str, np.ndarray] | None = None,
    ) -> PreferenceBatch:
        """Arranges pairs in packed rows.

        Args:
          dataset: the dataset of the pairs.
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
        shaped = {name: x.reshape(*shape, *x.shape[1:]) for name, x in arrays.items()}
        return PreferenceBatch(
            tokens=shaped["tokens"],
            lengths=shaped["lengths"],
            predictors=shaped["predictors"],
            targets=shaped["targets"],
            completions=shaped["completions"],
            positions=shaped["positions"],
            segments=shaped["segments"],
            **slot_fields(dataset, indices, reference),
        )

    def _check(self, step: int, needed: int) -> None:
        count = self.accumulation * self.rows
        if needed > count:
            fewest, size = -(-needed // self.rows), self.batch_size
            enough = (n for n in range(fewest, size) if size % n == 0)
            raise InputError(
                f"step {step + 1}: its pairs need {needed} packed rows, but a batch has"
                f" {count}; start again in another --out with --accumulation "
                f"{next(enough, size)}"
            )

    def _batch(
        self,
        dataset: PreferenceDataset,
        rows: Sequence[Sequence[int]],
        reference: Mapping[str, np.ndarray] | None,
    ) -> PreferenceBatch:
        """This process's rows of a batch, given the pairs of all rows."""
        indices = np.full((len(rows), self.slots), -1)
        for row, pairs in enumerate(rows):
            indices[row, : len(pairs)] = pairs
        own = iteration.block(self.rows, self.process_index, self.process_count)
        indices = indices.reshape(self.accumulation, -1, self.slots)[:, own]
        return self.collate(dataset, indices, reference=reference)


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
        nothing = dataset.tokens[:0]
        parts = [(prompt, nothing, np.arange(0))]
        for side in range(count):
            own_prompt = dataset.side_prompt(index, side)
            answer = dataset.completion(index, side)
            parts.append((own_prompt, answer, dataset.targets(index, side)))
        for part, (before, text, trained) in enumerate(parts):
            size = len(before) + len(text)
            inside = slice(at, at + size)
            row["tokens"][inside] = np.concatenate([before, text])
            first = len(prompt) if part else 0
            row["positions"][inside] = np.arange(first, first + size)
            row["segments"][inside] = (1 + count) * slot + part
            own = slice(predicted, predicted + len(trained))
            # The prompt's last token predicts the first of each completion.
            first_of = trained + len(before) == 0
            row["predictors"][own] = np.where(
                first_of, last, at + len(before) - 1 + trained
            )
            row["targets"][own] = text[trained]
            row["completions"][own] = slot * count + part - 1
            predicted += len(trained)
            at += size
    return at
