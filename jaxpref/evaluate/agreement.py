"""Agreement of annotators on pairs with several votes, with bootstrap intervals.

Which answer comes first in a pair means nothing.  So every item counts in both orders,
and the agreement expected by chance is 1/2.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.metrics import wilson_interval
from jaxpref.evaluate.votes import Votes

DRAWS = 1000
"""Bootstrap draws."""
BLOCK = 2_000_000
"""Weights of bootstrap draws in memory at once."""
FEWEST = 10
"""Common items that two annotators need for a kappa of their own."""
LISTED = 100
"""How many pairs of annotators are listed, by number of common items."""

Counts = Int[np.ndarray, "items categories"]
"""Votes by item and category."""
Weights = Float[np.ndarray, "*draws items"]
"""How often each item counts."""


def pairwise_agreement(counts: Counts, weights: Weights) -> Float[np.ndarray, "*draws"]:
    """The mean over items of the share of pairs of votes that agree.

        P_i = sum over j of n_ij (n_ij - 1) / (n_i (n_i - 1)),  n_i = sum over j of n_ij

    Args:
      counts: n_ij; every item has at least two votes.
      weights: how often each item counts.
    """
    return weights @ _agreeing(counts) / weights.sum(axis=-1)


def fleiss_kappa(counts: Counts, weights: Weights) -> Float[np.ndarray, "*draws"]:
    """(P - E) / (1 - E) with the mean P of P_i, and E the sum of squared shares.

    The shares are those of the categories among all votes.  Items may differ in their
    number of votes.  NaN if all votes are in one category.

    Args:
      counts: votes by item and category; every item has at least two votes.
      weights: how often each item counts.

    References:
      Fleiss, "Measuring nominal scale agreement among many raters", 1971.
    """
    totals = weights @ counts
    shares = totals / totals.sum(axis=-1, keepdims=True)
    chance = (shares**2).sum(axis=-1)
    return _beyond(pairwise_agreement(counts, weights), chance)


def krippendorff_alpha(counts: Counts, weights: Weights) -> Float[np.ndarray, "*draws"]:
    """1 - D / E for nominal data, with the observed and the expected disagreement.

        D = sum over i of n_i (1 - P_i) / n,  E = 1 - sum over j of n_j (n_j - 1) / (n
        (n - 1)),  n_j = sum over i of n_ij,  n = sum over j of n_j

    NaN if all votes are in one category.

    Args:
      counts: votes by item and category; every item has at least two votes.
      weights: how often each item counts.

    References:
      Krippendorff, "Computing Krippendorff's alpha-reliability", 2011.
    """
    sizes = counts.sum(axis=1)
    totals = weights @ counts
    count = totals.sum(axis=-1)
    observed = weights @ (sizes * (1 - _agreeing(counts))) / count
    same = (totals * (totals - 1)).sum(axis=-1) / (count * (count - 1))
    return _beyond(1 - observed, same)


def cohen_kappa(
    first: Int[np.ndarray, " items"],
    second: Int[np.ndarray, " items"],
    weights: Weights,
) -> Float[np.ndarray, "*draws"]:
    """(P - E) / (1 - E): P agreement, E the sum of the products of both shares.

    NaN if both annotators always choose the same category.

    Args:
      first: the category that one annotator chose for each item.
      second: that of the other annotator.
      weights: how often each item counts.

    References:
      Cohen, "A coefficient of agreement for nominal scales", 1960.
    """
    total = weights.sum(axis=-1)
    chance = sum(
        (weights @ (first == k)) * (weights @ (second == k))
        for k in np.unique(np.concatenate([first, second]))
    )
    return _beyond(weights @ (first == second) / total, chance / total**2)


def _agreeing(counts: Counts) -> Float[np.ndarray, " items"]:
    """P_i."""
    sizes = counts.sum(axis=1)
    return (counts * (counts - 1)).sum(axis=1) / (sizes * (sizes - 1))


def _beyond(found: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Agreement beyond chance, relative to the largest possible."""
    room = np.asarray(1 - chance)
    known = room > 1e-12
    return np.where(known, (found - chance) / np.where(known, room, 1.0), np.nan)


class Several(NamedTuple):
    """One vote of each annotator on each item that has at least two of them."""

    items: Int[np.ndarray, " votes"]
    """0, 1, ..., in ascending order."""
    annotators: Int[np.ndarray, " votes"]
    sides: Int[np.ndarray, " votes"]
    """0 or 1: the preferred text."""

    @property
    def counts(self) -> Counts:
        """Votes by item and preferred text."""
        sides = [
            np.bincount(self.items[self.sides == k], minlength=self.number)
            for k in (0, 1)
        ]
        return np.stack(sides, axis=1)

    @property
    def number(self) -> int:
        """The number of items."""
        return int(self.items[-1]) + 1 if len(self.items) else 0


def several(votes: Votes) -> Several:
    """The first vote of each annotator on each item, of items with two or more."""
    both = np.stack([votes.items, votes.annotators], axis=1)
    _, first = np.unique(both, axis=0, return_index=True)
    _, index, counts = np.unique(
        votes.items[first], return_inverse=True, return_counts=True
    )
    kept = first[counts[index] > 1]
    _, items = np.unique(votes.items[kept], return_inverse=True)
    sides = (votes.orientation[kept] > 0).astype(int)
    return Several(items, votes.annotators[kept], sides)


def agreement(votes: Votes, *, seed: int = 0) -> dict[str, Any] | None:
    """Agreement of named annotators on pairs with several votes.

    Returns:
      None if there are no two items with several votes.  `items`, `votes`, and
      `annotators`; `pairwise`, `fleiss_kappa` and `krippendorff_alpha`, each with
      `value` and a 95% `interval` (percentiles of `DRAWS` bootstrap draws of items);
      and `pairs`: for the `LISTED` pairs of annotators with the most common items, at
      least `FEWEST`, their `annotators`, the number of common `items`, the share
      `agree`, and `cohen_kappa`, with Wilson's intervals.
    """
    given = several(votes)
    if given.number < 2:
        return None
    counts = given.counts
    both_orders = np.concatenate([counts, counts[:, ::-1]])
    of = {
        "pairwise": lambda w: pairwise_agreement(counts, w),
        "fleiss_kappa": lambda w: fleiss_kappa(both_orders, _twice(w)),
        "krippendorff_alpha": lambda w: krippendorff_alpha(both_orders, _twice(w)),
    }
    return {
        "items": given.number,
        "votes": len(given.items),
        "annotators": len(np.unique(given.annotators)),
        **_intervals(of, given.number, seed),
        "pairs": _by_pair(given, votes),
    }


def _by_pair(given: Several, votes: Votes) -> list[dict[str, Any]]:
    """Cohen's kappa of two annotators."""
    common: dict[tuple[int, int], list[tuple[int, int]]] = {}
    starts = np.searchsorted(given.items, np.arange(given.number + 1))
    for begin, end in itertools.pairwise(starts):
        # Annotators are in ascending order within an item.
        for a, b in itertools.combinations(range(begin, end), 2):
            names = int(given.annotators[a]), int(given.annotators[b])
            chosen = int(given.sides[a]), int(given.sides[b])
            common.setdefault(names, []).append(chosen)
    ranked = sorted(common.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [
        {"annotators": [votes.names[k] for k in names], **_of_two(np.array(chosen))}
        for names, chosen in ranked[:LISTED]
        if len(chosen) >= FEWEST
    ]


def _of_two(chosen: Int[np.ndarray, "items 2"]) -> dict[str, Any]:
    """Agreement and kappa of two annotators.

    In both orders, kappa is 2 P - 1, so that it has the interval of P.
    """
    count = len(chosen)
    share = float(np.mean(chosen[:, 0] == chosen[:, 1]))
    low, high = wilson_interval(share, count)
    first, second = np.concatenate([chosen, 1 - chosen]).T
    kappa = float(cohen_kappa(first, second, np.ones(2 * count)))
    return {
        "items": count,
        "agree": {"value": share, "interval": [low, high]},
        "cohen_kappa": {"value": kappa, "interval": [2 * low - 1, 2 * high - 1]},
    }


def _twice(weights: Weights) -> Weights:
    return np.concatenate([weights, weights], axis=-1)


def _intervals(
    of: Mapping[str, Callable[[Weights], np.ndarray]], items: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Each statistic of all items, and its bootstrap interval."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in of}
    size = max(1, BLOCK // items)
    for start in range(0, DRAWS, size):
        shape = min(size, DRAWS - start)
        weights = rng.multinomial(items, np.full(items, 1 / items), size=shape)
        for name, statistic in of.items():
            drawn[name].append(statistic(weights.astype(float)))
    found = {}
    for name, statistic in of.items():
        low, high = np.quantile(np.concatenate(drawn[name]), [0.025, 0.975])
        value = float(statistic(np.ones(items)))
        found[name] = {"value": value, "interval": [float(low), float(high)]}
    return found


def with_others(votes: Votes) -> dict[int, dict[str, Any]]:
    """By annotator, how often the other votes on the same pairs agree with them.

    Returns:
      For each annotator with a common item: the number of these `items`, and the mean
      over them of the share of the others who `agree`.  Its `interval` is Wilson's, as
      if every item had one other vote, so it is wide enough.
    """
    given = several(votes)
    if not given.number:
        return {}
    counts = given.counts
    same = counts[given.items, given.sides] - 1
    shares = same / (counts.sum(axis=1)[given.items] - 1)
    found = {}
    for annotator in np.unique(given.annotators):
        mine = shares[given.annotators == annotator]
        mean = float(mine.mean())
        found[int(annotator)] = {
            "items": len(mine),
            "agree": mean,
            "interval": list(wilson_interval(mean, len(mine))),
        }
    return found
