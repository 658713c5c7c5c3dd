"""Packed rows: several pairs in one sequence, each prompt once, hardly any padding.

A pair lies in its row as prompt, chosen, rejected.  Both answers continue the prompt's
positions; the rejected one attends to the prompt and to itself, never to the chosen
one: `segments` say which part of which pair a token is.

Which pairs share a row is decided by best fit in the order of the shuffled stream, with
a look ahead for pairs that fill gaps: a pure function of the lengths, the seed and the
step, the same on every process, for a number of rows that is fixed when a run begins
(a multiple of its devices and micro-batches).  So the number of pairs in a batch
varies, and losses are divided by what it is.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from jaxpref.data.batch import PARTS, PreferenceBatch, slot_fields
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.pipeline import rows_of_process, shuffled
from jaxpref.data.workers import InProcesses
from jaxpref.errors import InputError

LOOK_AHEAD = 8
"""Pairs waiting for a gap, as a multiple of what a batch holds."""


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """Static sizes of a packed row and of a batch."""

    sequence_length: int
    """T, tokens of a row."""
    predictions: int
    """P, predicted tokens of a row."""
    slots: int
    """S, most pairs of a row."""
    sides: int
    """K, completions of a pair."""
    rows: int
    """Rows of a batch, over all micro-batches and all processes."""


def packed_shape(
    *pairs: PreferenceDataset,
    row_length: int,
    batch_size: int,
    parts: int = 1,
    multiple: int = 8,
) -> PackedShape:
    """Sizes for which a batch holds about `batch_size` pairs, with little room unused.

    Args:
      *pairs: all the pairs a run will see (train and held-out).
      row_length: T, at least the tokens of any pair: its prompt once and its answers.
      batch_size: pairs a batch shall hold on average.
      parts: the number of rows is a multiple of this, accumulation times processes.
      multiple: P is a multiple of this.

    Raises:
      InputError: if a pair is longer than a row, or so many rows hold far more pairs.
    """
    filled = [p for p in pairs if len(p)]
    tokens = np.concatenate([lengths(p)[0] for p in filled])
    answers = np.concatenate([lengths(p)[1] for p in filled])
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
    rows = max(round(batch_size / held / parts), 1) * parts
    if rows * held > max(1.5 * batch_size, batch_size + held):
        raise InputError(
            f"row_length {row_length}: {rows} rows, one at least for each device and "
            f"micro-batch, hold about {rows * held:.0f} pairs, and batch_size is "
            f"{batch_size}; give shorter rows or a larger batch"
        )
    return PackedShape(
        sequence_length=row_length,
        predictions=predictions,
        slots=slots,
        sides=filled[0].num_completions,
        rows=rows,
    )


def lengths(pairs: PreferenceDataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each pair, its prompt counted once, and of its completions; int [N]."""
    answers = pairs.completion_lengths.sum(axis=1)
    return pairs.prompt_lengths + answers, answers


def packed_batches(
    pairs: PreferenceDataset,
    *,
    shape: PackedShape,
    accumulation: int = 1,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    reference: Mapping[str, np.ndarray] | None = None,
    prefetch: int = 4,
    processes: int = 0,
) -> grain.DatasetIterator | InProcesses:
    """Endless training batches of packed rows; see the module's text.

    Args:
      pairs: the training pairs of a plan.
      shape: from `packed_shape`.
      accumulation: A, micro-batches of a step.
      seed: of the order.
      process_index: this process; it gets a block of every micro-batch's rows.
      process_count: how many there are: all see the same global batches.
      reference: float32 [N, K] arrays by name, copied into the batches, or None.
      prefetch: batches that a thread keeps ready; 0 makes each when asked.
      processes: processes that collate in place of the thread, see `InProcesses`; each
        decides for all batches which pairs share a row, and lays out its own.

    Returns:
      An iterator of PreferenceBatch with `get_state()` and `set_state(state)`.

    Raises:
      InputError: if there is no pair, or the rows cannot be shared out.
    """
    micro = rows_of_process(shape.rows, accumulation, process_count)
    stream = shuffled(pairs, seed).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    block = slice(process_index * micro, (process_index + 1) * micro)

    def batch(rows: list[list[int]]) -> PreferenceBatch:
        indices = as_array(rows, shape).reshape(accumulation, -1, shape.slots)
        return collate_packed(
            pairs, indices[:, block], shape=shape, reference=reference
        )

    packed = functools.partial(_Packed, stream, *lengths(pairs), shape)
    if processes:
        return InProcesses(
            lambda state, index: packed(state, index, processes).map(batch),
            iter(packed()).get_state(),
            lambda _, own: own,
            processes=processes,
            prefetch=prefetch,
        )
    dataset = packed().map(batch)
    if prefetch:
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=prefetch
        )
    return iter(dataset)


def packed_eval_batches(
    pairs: PreferenceDataset,
    *,
    shape: PackedShape,
    accumulation: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    reference: Mapping[str, np.ndarray] | None = None,
) -> Iterator[PreferenceBatch]:
    """Every pair once, in packed rows; the last batch is filled up with empty rows.

    Arguments as for `packed_batches`.  Every process gets the same number of batches.
    """
    micro = rows_of_process(shape.rows, accumulation, process_count)
    block = slice(process_index * micro, (process_index + 1) * micro)
    if not len(pairs):
        return
    tokens, answers = lengths(pairs)
    ahead = window(tokens, shape)
    waiting, coming = collections.deque(), iter(range(len(pairs)))
    while True:
        waiting.extend(itertools.islice(coming, ahead - len(waiting)))
        if not waiting:
            return
        rows = fill(waiting, tokens, answers, shape)
        indices = as_array(rows, shape).reshape(accumulation, -1, shape.slots)
        yield collate_packed(pairs, indices[:, block], shape=shape, reference=reference)


def fill(
    waiting: collections.deque[int],
    tokens: np.ndarray,
    answers: np.ndarray,
    shape: PackedShape,
) -> list[list[int]]:
    """Takes pairs out of `waiting` for one batch: the pairs of each row.

    In order, each into the row with the least room that still holds it; who fits
    nowhere stays, in order.  The first always fits, so nobody waits for ever.
    """
    rows: list[list[int]] = [[] for _ in range(shape.rows)]
    room = np.full(shape.rows, shape.sequence_length)
    answer_room = np.full(shape.rows, shape.predictions)
    slots = np.full(shape.rows, shape.slots)
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


def window(tokens: np.ndarray, shape: PackedShape) -> int:
    """Pairs that are looked at for a batch."""
    held = shape.rows * shape.sequence_length / tokens.mean()
    return int(np.ceil((1 + LOOK_AHEAD) * held))


def as_array(rows: Sequence[Sequence[int]], shape: PackedShape) -> np.ndarray:
    """The pairs of each row, int [rows, S], -1 in empty slots."""
    indices = np.full((len(rows), shape.slots), -1)
    for row, held in enumerate(rows):
        indices[row, : len(held)] = held
    return indices


class _Packed(grain.IterDataset):
    """Rows of pair numbers, a batch an element, from a stream of pair numbers.

    From a saved state on, where one is given, each `every`-th batch from `first`.
    """

    def __init__(
        self, parent, tokens, answers, shape: PackedShape, state=None, first=0, every=1
    ):
        super().__init__(parent)
        self._sizes, self._start = (tokens, answers, shape), state
        self._part = first, every

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PackedIterator(iter(self._parent), *self._sizes, *self._part)
        if self._start is not None:
            iterator.set_state(self._start)
        return iterator


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, parent, tokens, answers, shape: PackedShape, first, every):
        super().__init__(parent)
        self._tokens, self._answers, self._shape = tokens, answers, shape
        self._ahead = window(tokens, shape)
        self._waiting: collections.deque[int] = collections.deque()
        self._others, self._every = first, every

    def __next__(self) -> list[list[int]]:
        # Before and not after its own: the state is then that of the whole stream.
        for _ in range(self._others):
            self._rows()
        self._others = self._every - 1
        return self._rows()

    def _rows(self) -> list[list[int]]:
        while len(self._waiting) < self._ahead:
            self._waiting.append(int(next(self._parent)))
        return fill(self._waiting, self._tokens, self._answers, self._shape)

    def get_state(self) -> dict:
        return {"stream": self._parent.get_state(), "waiting": list(self._waiting)}

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state["stream"])
        self._waiting = collections.deque(state["waiting"])


def collate_packed(
    pairs: PreferenceDataset,
    indices: np.ndarray,
    *,
    shape: PackedShape,
    reference: Mapping[str, np.ndarray] | None = None,
) -> PreferenceBatch:
    """Lays pairs out in packed rows.

    Args:
      pairs: where the tokens are.
      indices: int [A, R, S]; the pairs of each row, -1 in empty slots.
      shape: T, P, S and K of the batch.
      reference: float32 [N, K] arrays of all pairs by name, or None.

    Returns:
      The batch of numpy arrays [A, R, ...] with Q = 1 sequence a row.
    """
    flat = indices.reshape(-1, shape.slots)
    blank = lambda size, value=0: np.full((len(flat), size), value, np.int32)
    tokens, positions = blank(shape.sequence_length), blank(shape.sequence_length)
    segments = blank(shape.sequence_length, -1)
    predictors, targets = blank(shape.predictions), blank(shape.predictions)
    completions = blank(shape.predictions, -1)
    ends = np.zeros(len(flat), np.int32)
    for row, slots in enumerate(flat):
        at = predicted = 0
        for slot, index in enumerate(slots):
            if index < 0:
                continue
            prompt = pairs.prompt(index)
            last = at + len(prompt) - 1
            parts = [prompt, *(pairs.completion(index, k) for k in range(shape.sides))]
            for part, text in enumerate(parts):
                inside = slice(at, at + len(text))
                tokens[row, inside] = text
                first = len(prompt) if part else 0
                positions[row, inside] = first + np.arange(len(text))
                segments[row, inside] = PARTS * slot + part
                if part:
                    own = slice(predicted, predicted + len(text))
                    # The prompt's last token predicts the first of either answer.
                    predictors[row, own] = [last, *range(at, at + len(text) - 1)]
                    targets[row, own] = text
                    completions[row, own] = slot * shape.sides + part - 1
                    predicted += len(text)
                at += len(text)
        ends[row] = at

    def shaped(array: np.ndarray, *axes: int) -> np.ndarray:
        return array.reshape(*indices.shape[:2], *axes)

    return PreferenceBatch(
        tokens=shaped(tokens, 1, -1),
        lengths=shaped(ends, 1),
        predictors=shaped(predictors, 1, -1),
        targets=shaped(targets, 1, -1),
        completions=shaped(completions, 1, -1),
        positions=shaped(positions, 1, -1),
        segments=shaped(segments, 1, -1),
        **slot_fields(pairs, indices, reference),
    )
