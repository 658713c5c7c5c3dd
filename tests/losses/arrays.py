"""Random inputs that are exact in float32, by the names of a loss's arrays."""

import numpy as np

from tests.losses.row import Row

PAIRS = 16
RANGES = {
    "logps": (-8.0, 0.0),
    "margins": (0.0, 3.0),
    "rewards": (-4.0, 4.0),
    "margin": (0.0, 3.0),
    "strength": (1.0, 3.0),
    "tie": (0.0, 1.0),
    "kls": (0.0, 8.0),
    "ratios": (-4.0, 4.0),
    "mean": (-2.0, 2.0),
    "weights": (-2.0, 0.0),
}


def arrays_of(row: Row, *, extreme=True, seed=0, pairs=PAIRS) -> list[np.ndarray]:
    """One array per name that the loss reads; the first starts with the extremes."""
    rng = np.random.default_rng(seed)
    drawn = []
    for name in row.reads:
        kind = name.split("_")[-1]
        if kind == "lengths":
            # Powers of two make every quotient exact.
            drawn.append(2.0 ** rng.integers(0, 5, pairs))
        else:
            low, high = row.draw.get(name) or RANGES[kind]
            # A running statistic is one number for all pairs.
            shape = () if name.startswith("running") else pairs
            drawn.append(np.round(rng.uniform(low, high, shape) * 2**10) / 2**10)
    if extreme:
        drawn[0][: len(row.extremes)] = row.extremes
    return drawn


def of_pairs(change, arrays):
    """Applies `change` to every array with one number per pair, not to statistics."""
    return [change(array) if np.ndim(array) else array for array in arrays]


def differentiable(row: Row) -> list[int]:
    """Indices of the arrays that have gradients in training."""
    ends = ("rewards", "kls", "ratios")
    moving = lambda n: n.startswith("policy") or n.endswith(ends)
    return [i for i, name in enumerate(row.reads) if moving(name)]


def swapped(row: Row, arrays):
    """The same pairs with chosen and rejected exchanged; other arrays are unchanged."""
    exchange = {"chosen": "rejected", "rejected": "chosen"}
    values = dict(zip(row.reads, arrays))
    other = lambda name: "_".join(exchange.get(w, w) for w in name.split("_"))
    return [values.get(other(name), values[name]) for name in row.reads]
