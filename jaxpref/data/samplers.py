"""The order of examples: which pairs a step sees, as a pure function of seed and step.

A sampler is `order(step, batch_size) -> int [batch_size]`, indices into a dataset.  It
depends on nothing else: not on processes, layout or accumulation.
"""

import dataclasses
from collections.abc import Callable

import grain
import numpy as np

from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.options import MixOptions
from jaxpref.errors import InputError

Order = Callable[[int, int], np.ndarray]
"""`order(step, batch_size)` -> int [batch_size], the pairs of a step."""


def uniform(dataset: PreferenceDataset, seed: int) -> Order:
    """Every epoch has every pair once, in an order of its own.

    An epoch that does not divide into batches runs on into the next.

    Args:
      dataset: the pairs.
      seed: another seed gives an unrelated order in every epoch.

    Raises:
      InputError: there is no pair.
    """
    if not len(dataset):
        raise InputError("no pair is left to train on")
    return _Uniform(_shuffled(len(dataset), seed, salt="order"))


def mixture(
    dataset: PreferenceDataset,
    seed: int,
    empty_share: float = MixOptions.empty_share,
) -> Order:
    """A fixed number of pairs with an empty trace in every batch, and of the others.

    Each kind is shuffled on its own, as by `uniform`: how many pairs the other kind has
    changes nothing in its order.  Place i of the B places of a batch holds an empty
    trace exactly where floor((i + 1) n / B) > floor(i n / B), n of them: as evenly as
    can be, so that every micro-batch, process and device has the same mix where
    n / (their number) is an integer.

    Args:
      dataset: of `make_mixed_splits`.
      seed: of both orders, which do not depend on each other.
      empty_share: n / B before it is rounded; at least one pair is of each kind.

    Raises:
      InputError: there is no pair of one kind; or later a batch of one pair.
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


def in_order(dataset: PreferenceDataset) -> Order:
    """The pairs as they are in the dataset, over and over."""
    return _InOrder(len(dataset))


def empty_places(batch_size: int, share: float) -> np.ndarray:
    """Which places of a batch hold an empty trace, bool [B], as evenly as can be."""
    if batch_size < 2:
        raise InputError("batch_size 1 has no room for pairs of both kinds; give 2")
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
class _InOrder:
    count: int

    def __call__(self, step: int, batch_size: int) -> np.ndarray:
        return (step * batch_size + np.arange(batch_size)) % self.count


def _shuffled(count: int, seed: int, *, salt: str) -> grain.MapDataset:
    """Numbers below `count` without end, every epoch in an order of its own."""
    # Grain gives epoch e the seed `seed + e`: neighboring seeds would share epochs.
    (number,) = hash_uniforms([str(seed)], salt=salt)
    return grain.MapDataset.range(count).shuffle(seed=int(number * 2**32)).repeat()


def _part(stream: grain.MapDataset, step: int, size: int) -> np.ndarray:
    return np.array([stream[n] for n in range(step * size, (step + 1) * size)])
