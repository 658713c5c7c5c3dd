"""Samplers: the pairs of each step, as a pure function of seed and step.

A sampler is `order(step, batch_size) -> int [batch_size]`, indices into a dataset.  It
does not depend on processes, layout or accumulation.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import grain
import numpy as np

from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.options import MixOptions
from jaxpref.errors import InputError

Order = Callable[[int, int], np.ndarray]
"""`order(step, batch_size)` -> int [batch_size], the pairs of a step."""


def make_order(
    dataset: PreferenceDataset,
    *,
    seed: int,
    empty_share: float | None,
    weights: Sequence[float] | None = None,
) -> Order:
    """The order of the training pairs.

    Args:
      dataset: the pairs.
      seed: the seed of the order.
      empty_share: for `mixture`; None without one.
      weights: for `weighted`; None without weights.
    """
    if empty_share is not None:
        return mixture(dataset, seed, empty_share)
    if weights is not None:
        return weighted(dataset, seed, weights)
    return uniform(dataset, seed)


def uniform(dataset: PreferenceDataset, seed: int) -> Order:
    """Every epoch has every pair once, in a new random order.

    A batch may span two epochs.

    Args:
      dataset: the pairs.
      seed: another seed gives an unrelated order in every epoch.

    Raises:
      InputError: if there are no pairs.
    """
    if not len(dataset):
        raise InputError("no pair is left to train on")
    return _Uniform(_shuffled(len(dataset), seed, salt="order"))


def mixture(
    dataset: PreferenceDataset,
    seed: int,
    empty_share: float = MixOptions.empty_share,
) -> Order:
    """Every batch has the same number of pairs with an empty trace.

    Each kind of pairs is shuffled separately, as by `uniform`, so its order does not
    depend on the other kind.  Position i of the B positions of a batch holds an empty
    trace if floor((i + 1) n / B) > floor(i n / B), where n is their number.  This is as
    even as possible: every micro-batch, process and device has the same mix if
    n / (their number) is an integer.

    Args:
      dataset: from `make_mixed_splits`.
      seed: the seed of both orders, which are independent.
      empty_share: n / B before rounding; there is at least one pair of each kind.

    Raises:
      InputError: if there are no pairs of one kind.  `order` raises it for a batch of
        one pair.
    """
    is_empty = dataset.columns["empty_trace"]
    kinds = []
    for name, kind, what in (
        ("trace", False, "with a trace"),
        ("empty", True, "with an empty trace"),
    ):
        indices = np.flatnonzero(is_empty == kind)
        if not len(indices):
            raise InputError(f"no pair {what} is left to train on; add some")
        kinds.append((indices, _shuffled(len(indices), seed, salt=f"order {name}")))
    return _Mixture(*kinds, empty_share=empty_share)


def weighted(dataset: PreferenceDataset, seed: int, weights: Sequence[float]) -> Order:
    """Every source has its share of the pairs, evenly spread over the positions.

    The pairs of each source are shuffled separately, as by `uniform`: none is repeated
    before all others of its source have occurred.  Of the first p positions, source 0
    has floor(w_0 p), source 1 the floor of w_1 / (1 - w_0) times the rest, and so on.

    Args:
      dataset: pairs with the column `source`.
      seed: the seed of all orders, which are independent.
      weights: the share w of each source, > 0; their sum is 1.

    Raises:
      InputError: if a source has no pairs.
    """
    sources = []
    for number in range(len(weights)):
        indices = np.flatnonzero(dataset.columns["source"] == number)
        if not len(indices):
            raise InputError(
                f"--data: no pair of file {number + 1} is left to train on; drop it"
            )
        stream = _shuffled(len(indices), seed, salt=f"order source {number}")
        sources.append((indices, stream))
    return _Weighted(tuple(sources), tuple(weights))


def in_order(dataset: PreferenceDataset) -> Order:
    """The pairs in the order of the dataset, repeated."""
    return _InOrder(len(dataset))


def first_seen(
    order: Order, dataset: PreferenceDataset, *, batch_size: int, num_steps: int
) -> np.ndarray:
    """The distinct pairs of the first steps, in order of first occurrence.

    Args:
      order: from `uniform` or `mixture`.
      dataset: the dataset that it orders.
      batch_size: pairs per step.
      num_steps: number of steps.

    Returns:
      int [M], M at most the number of pairs.
    """
    seen: dict[int, None] = {}
    for step in range(num_steps):
        seen |= dict.fromkeys(order(step, batch_size).tolist())
        if len(seen) == len(dataset):
            break
    return np.array([*seen], np.int64)


def empty_places(batch_size: int, share: float) -> np.ndarray:
    """Which positions of a batch hold an empty trace, bool [B], evenly spaced."""
    if batch_size < 2:
        raise InputError(
            "batch_size 1 cannot hold pairs of both kinds; give at least 2"
        )
    count = min(max(round(batch_size * share), 1), batch_size - 1)
    bounds = np.arange(batch_size + 1) * count // batch_size
    return np.diff(bounds) > 0


@dataclasses.dataclass(frozen=True)
class _Uniform:
    stream: grain.MapDataset

    def __call__(self, step: int, batch_size: int) -> np.ndarray:
        return _part(self.stream, step, batch_size)


@dataclasses.dataclass(frozen=True)
class _Mixture:
    trace: tuple[np.ndarray, grain.MapDataset]
    empty: tuple[np.ndarray, grain.MapDataset]
    empty_share: float

    def __call__(self, step: int, batch_size: int) -> np.ndarray:
        is_empty = empty_places(batch_size, self.empty_share)
        drawn = np.empty(batch_size, np.int64)
        for (indices, stream), places in (
            (self.trace, ~is_empty),
            (self.empty, is_empty),
        ):
            drawn[places] = indices[_part(stream, step, int(places.sum()))]
        return drawn


@dataclasses.dataclass(frozen=True)
class _Weighted:
    sources: tuple[tuple[np.ndarray, grain.MapDataset], ...]
    weights: tuple[float, ...]

    def __call__(self, step: int, batch_size: int) -> np.ndarray:
        first = step * batch_size
        return np.array([self._pair(first + n) for n in range(batch_size)], np.int64)

    def _pair(self, place: int) -> int:
        """The pair at a position, from the sources that are left for it."""
        left = 1.0
        for (indices, stream), weight in zip(self.sources[:-1], self.weights):
            share = min(weight / left, 1.0)
            before = math.floor(place * share)
            if math.floor((place + 1) * share) > before:
                return int(indices[stream[before]])
            place, left = place - before, left - weight
        indices, stream = self.sources[-1]
        return int(indices[stream[place]])


@dataclasses.dataclass(frozen=True)
class _InOrder:
    count: int

    def __call__(self, step: int, batch_size: int) -> np.ndarray:
        return (step * batch_size + np.arange(batch_size)) % self.count


def _shuffled(count: int, seed: int, *, salt: str) -> grain.MapDataset:
    """An endless stream of numbers below `count`, reshuffled every epoch."""
    # Grain seeds epoch e with `seed + e`, so neighboring seeds would share epochs.
    (number,) = hash_uniforms([str(seed)], salt=salt)
    return grain.MapDataset.range(count).shuffle(seed=int(number * 2**32)).repeat()


def _part(stream: grain.MapDataset, step: int, size: int) -> np.ndarray:
    return np.array([stream[n] for n in range(step * size, (step + 1) * size)])
