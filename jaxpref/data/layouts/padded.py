"""Padded rows: one pair per row, one completion per sequence, of equal length."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from jaxpref.data.batch import PreferenceBatch, slot_fields
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.layouts import iteration
from jaxpref.data.samplers import Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedLayout:
    """The sizes of a run's batches, and this process's share of their rows."""

    sequence_length: int
    """T, tokens of a sequence."""
    predictions: int
    """P, predicted tokens of a sequence."""
    num_completions: int
    """K, completions of a prompt; also Q, sequences of a row."""
    batch_size: int
    """Pairs per step, over all micro-batches and processes."""
    num_votes: int = 1
    """V, maximum number of votes on a pair."""
    accumulation: int = 1
    """A, micro-batches per step."""
    process_index: int = 0
    process_count: int = 1
    """The pairs of a micro-batch do not depend on this; process p makes the p-th block
    of its rows."""

    def __post_init__(self):
        iteration.check_rows(self.batch_size, self.accumulation, self.process_count)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all processes."""
        return self.batch_size // self.accumulation

    def of_all_processes(self) -> "PaddedLayout":
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

        # A closure, since Grain prints functions, and would print a partial's arrays.
        def make_batch(step: int) -> PreferenceBatch:
            return self._batch(dataset, order(step, self.batch_size), reference)

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
    ) -> Iterable[PreferenceBatch]:
        """Every pair once, in order; see `Layout.eval_batches`."""
        iteration.check_reference(dataset, reference)
        indices = np.arange(len(dataset)) if indices is None else indices
        whole = np.append(indices, np.full(-len(indices) % self.batch_size, -1))
        steps = grain.MapDataset.source(list(whole.reshape(-1, self.batch_size)))
        batches = steps.map(lambda pairs: self._batch(dataset, pairs, reference))
        return batches.to_iter_dataset(iteration.read_ahead(threads, prefetch))

    def abstract_batch(
        self, *, numbers: Iterable[str] = (), reference: Iterable[str] = ()
    ) -> Any:
        """The shapes of a batch of all processes; see `Layout.abstract_batch`."""
        dataset = iteration.one_pair(self.num_completions, numbers, self.num_votes)
        table = np.zeros((1, self.num_completions), np.float32)
        batch = self.collate(
            dataset, np.full((1, 1), -1), reference=dict.fromkeys(reference, table)
        )
        return iteration.with_rows(batch, self.accumulation, self.rows)

    def describe(self) -> str:
        """The shape of every batch in one line."""
        return (
            f"{self.batch_size} pairs per step, one per row: {self.accumulation} x "
            f"{self.rows} rows of {self.num_completions} x {self.sequence_length} "
            "tokens"
        )

    def rounding(self) -> str:
        """The parts of the shape that affect rounding; see `Layout.rounding`."""
        sizes = f"{self.sequence_length} tokens, {self.predictions} predictions"
        return f"{self.accumulation} x {self.rows} rows of {sizes}"

    def overhead(self, dataset: PreferenceDataset) -> float:
        """Number of tokens computed per token of the dataset."""
        tokens = self.num_completions * self.sequence_length * len(dataset)
        return tokens / dataset.packed_lengths.sum()

    def collate(
        self,
        dataset: PreferenceDataset,
        indices: np.ndarray,
        *,
        reference: Mapping[str, np.ndarray] | None = None,
    ) -> PreferenceBatch:
        """Arranges pairs in rows.

        Args:
          dataset: the dataset of the pairs.
          indices: int [A, R]; the pair of each row, -1 for an empty row.
          reference: float32 [N, K] arrays of all pairs by name, or None.

        Returns:
          The batch of numpy arrays [A, R, ...]; empty rows are zeros with pair -1.
        """
        flat = indices.reshape(-1)
        count = self.num_completions
        tokens = np.zeros((len(flat), count, self.sequence_length), np.int32)
        lengths = np.zeros((len(flat), count), np.int32)
        predictors = np.zeros((len(flat), count, self.predictions), np.int32)
        targets = np.zeros_like(predictors)
        completions = np.full_like(predictors, -1)
        for row in np.flatnonzero(flat >= 0):
            for side in range(count):
                prompt = dataset.context(flat[row], side)
                completion = dataset.completion(flat[row], side)
                start, size = len(prompt), len(completion)
                if not size:
                    continue
                tokens[row, side, :start] = prompt
                tokens[row, side, start : start + size] = completion
                lengths[row, side] = start + size
                # The state at position t predicts token t + 1.
                own = dataset.targets(flat[row], side)
                predictors[row, side, : len(own)] = start - 1 + own
                targets[row, side, : len(own)] = completion[own]
                completions[row, side, : len(own)] = side
        shaped = lambda array: array.reshape(*indices.shape, *array.shape[1:])
        return PreferenceBatch(
            tokens=shaped(tokens),
            lengths=shaped(lengths),
            predictors=shaped(predictors),
            targets=shaped(targets),
            completions=shaped(completions),
            **slot_fields(dataset, indices[..., None], reference),
        )

    def _batch(
        self,
        dataset: PreferenceDataset,
        indices: np.ndarray,
        reference: Mapping[str, np.ndarray] | None,
    ) -> PreferenceBatch:
        """This process's rows of a batch, given its pairs, int [batch_size]."""
        own = iteration.block(self.rows, self.process_index, self.process_count)
        rows = indices.reshape(self.accumulation, -1)[:, own]
        return self.collate(dataset, rows, reference=reference)


def padded_layout(
    *datasets: PreferenceDataset,
    batch_size: int,
    accumulation: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    length_multiple: int = 8,
    prediction_multiple: int = 8,
) -> PaddedLayout:
    """The smallest layout that holds every sequence of the datasets, rounded up.

    Args:
      *datasets: all data of the run (training and held-out).
      batch_size: pairs per step, over all micro-batches and processes.
      accumulation: A, micro-batches per step.
      process_index: index of this process.
      process_count: number of processes.
      length_multiple: T is a multiple of this.
      prediction_multiple: P is a multiple of this.

    Raises:
      InputError: if micro-batches and processes cannot share the rows.
    """
    count = iteration.num_completions(datasets)
    longest = max(x.longest for x in datasets)
    answer = max(int(x.target_lengths.max(initial=0)) for x in datasets)
    return PaddedLayout(
        sequence_length=-(-longest // length_multiple) * length_multiple,
        predictions=-(-answer // prediction_multiple) * prediction_multiple,
        num_completions=count,
        num_votes=iteration.num_votes(datasets),
        batch_size=batch_size,
        accumulation=accumulation,
        process_index=process_index,
        process_count=process_count,
    )
