"""Bin packing: which pairs share a row, by their lengths."""

import collections
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RowSize:
    """The capacity of a row."""

    tokens: int
    """Of prompts and completions."""
    predictions: int
    """Tokens of completions."""
    slots: int
    """Pairs."""


def first_fit_decreasing(
    tokens: np.ndarray, predictions: np.ndarray, size: RowSize
) -> np.ndarray:
    """The row of each pair, for many steps at once.

    The pairs of each step are sorted by decreasing number of tokens (stably), and each
    is put into the first row that still has room for it.  Steps are independent.

    Args:
      tokens: int [steps, B], the tokens of each pair; no pair is larger than a row.
      predictions: int [steps, B], the completion tokens of each pair.
      size: the capacity of every row.

    Returns:
      int [steps, B], numbering the rows of each step from 0.
    """
    steps, count = tokens.shape
    order = np.argsort(-tokens, axis=1, kind="stable")
    each = np.arange(steps)
    # Start with a few more rows than the tokens fill, and add more when needed.
    most = min(count, int(1.3 * tokens.sum(1).max(initial=0) / size.tokens) + 1)
    limits = np.array([size.tokens, size.predictions, size.slots])
    room = np.tile(limits, (steps, max(most, 1), 1))
    rows = np.empty((steps, count), np.int64)
    for n in range(count):
        pair = order[:, n]
        need = np.stack(
            [tokens[each, pair], predictions[each, pair], np.ones(steps, np.int64)], 1
        )
        fits = np.all(room >= need[:, None], axis=2)
        if not fits.any(axis=1).all():
            room = np.concatenate([room, np.tile(limits, (steps, 1, 1))], 1)
            fits = np.concatenate([fits, np.ones((steps, 1), bool)], 1)
        row = fits.argmax(1)
        rows[each, pair] = row
        room[each, row] -= need
    return rows


def best_fit(
    waiting: collections.deque[int],
    tokens: np.ndarray,
    predictions: np.ndarray,
    size: RowSize,
    count: int,
) -> list[list[int]]:
    """Moves pairs from `waiting` into `count` rows, and returns the pairs of each row.

    In order, each pair is put into the fullest row that still has room for it.  Pairs
    that fit nowhere stay in `waiting`, in order.  The first pair always fits, so no
    pair waits forever.

    Args:
      waiting: indices into `tokens` and `predictions`.
      tokens: int [N], the tokens of each pair; no pair is larger than a row.
      predictions: int [N], the completion tokens of each pair.
      size: the capacity of every row.
      count: number of rows to fill.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    room = np.full(count, size.tokens)
    prediction_room = np.full(count, size.predictions)
    slots = np.full(count, size.slots)
    left = []
    for _ in range(len(waiting)):
        index = waiting.popleft()
        after = room - tokens[index]
        fits = (after >= 0) & (prediction_room >= predictions[index]) & (slots > 0)
        if not fits.any():
            left.append(index)
            continue
        row = int(np.argmin(np.where(fits, after, np.iinfo(np.int64).max)))
        rows[row].append(int(index))
        room[row] -= tokens[index]
        prediction_room[row] -= predictions[index]
        slots[row] -= 1
    waiting.extend(left)
    return rows
