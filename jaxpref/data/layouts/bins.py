"""Which pairs share a row: bin packing of lengths, without tokens."""

import collections
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RowSize:
    """What a row holds at most."""

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

    The pairs of a step are taken by falling number of tokens, equal ones in their
    order, each into the first row that still has room for it.  Steps do not depend on
    each other.

    Args:
      tokens: int [steps, B], of each pair; none is larger than a row.
      predictions: int [steps, B], of each pair.
      size: of every row.

    Returns:
      int [steps, B], rows of a step from 0 on.
    """
    steps, count = tokens.shape
    order = np.argsort(-tokens, axis=1, kind="stable")
    each = np.arange(steps)
    # A few more rows than the tokens fill; more are added when they are needed.
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
    """Takes pairs out of `waiting` for `count` rows: the pairs of each row.

    In order, each into the row with the least room that still holds it; pairs that fit
    nowhere stay, in order.  The first always fits, so no pair waits forever.

    Args:
      waiting: indices into `tokens` and `predictions`.
      tokens: int [N], of each pair; none is larger than a row.
      predictions: int [N], of each pair.
      size: of every row.
      count: rows to fill.
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
