"""How many pairs or votes would determine a flip rate to a stated width.

An item with margin z (nats, for its first answer) and k votes, of which a prefer the
first answer, has the probability

    P(a; e, T) = C(k, a) (s(z / T) (1 - e)^a e^(k - a) + s(-z / T) (1 - e)^(k - a) e^a)

If the rate is e0 and T = 1, an item is expected to lower the log-likelihood of another
rate, at its best temperature, by

    D(e) = min over T  of  mean over z of  KL(P(.; e0, 1) || P(.; e, T))

So n items give a profile-likelihood interval of about the rates with n D(e) < 1.92,
which is half the 95% quantile of chi-squared with one degree of freedom.  For a
narrow interval, which needs many items, this agrees with the Fisher information; for a
wide one, it accounts for D not being a parabola.  The derivation is ours.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref.evaluate.crossfit import sigmoid

VOTES = (1, 2, 3, 5)
"""Numbers of votes per pair to compare."""
DROP = 1.920729
"""Half the 95% quantile of chi-squared with one degree of freedom."""
RATES = 40
"""Number of rates on each side at which D is computed."""
MARGINS = 400
"""Number of quantiles that stand for the margins."""
LARGEST = 8.0
"""|log2 T| of the temperatures considered."""
HALVINGS = 30
"""Steps of the searches for a temperature and for a number."""
MOST = 1e9
"""If this many pairs are not enough, no number is reported."""


def pairs_needed(
    margins: Float[np.ndarray, " pairs"],
    *,
    flip_rate: float,
    width: float,
    votes: Sequence[int] = VOTES,
) -> list[dict[str, Any]]:
    """Pairs for an interval of the flip rate of this width, by votes per pair.

    Args:
      margins: calibrated margins like those to expect, nats; [pairs].
      flip_rate: e, the rate to expect, in (0, 1/2).
      width: upper minus lower end of the 95% interval.
      votes: votes per pair; one record for each.

    Returns:
      `votes_per_pair` and `pairs`, which is None if no number of pairs would do.
    """
    at = (np.arange(MARGINS) + 0.5) / MARGINS
    z = np.quantile(np.abs(margins), at)
    return [
        {"votes_per_pair": count, "pairs": _pairs(z, flip_rate, count, width)}
        for count in votes
    ]


def votes_needed(
    margins: Float[np.ndarray, " pairs"], *, flip_rate: float, width: float
) -> int | None:
    """Votes of an annotator for an interval of the reliability of this width.

    Each vote is on another pair, and the temperature is known from all annotators.
    Arguments as in `pairs_needed`.
    """
    p = sigmoid(margins)
    agrees = flip_rate + (1 - 2 * flip_rate) * p
    information = float(np.mean((2 * p - 1) ** 2 / (agrees * (1 - agrees))))
    return _whole(8 * DROP / (information * width**2) if information > 0 else math.inf)


def _whole(number: float) -> int | None:
    return math.ceil(number) if number < MOST else None


def _pairs(z: np.ndarray, rate: float, votes: int, width: float) -> int | None:
    """The pairs for which the rates with n D < DROP span this width."""
    # sqrt(D) is nearly linear on both sides of the rate, which suits interpolation.
    near = np.linspace(0, 1, RATES) ** 2
    below, above = rate - (rate - 1e-4) * near, rate + (0.4999 - rate) * near
    lower = np.sqrt(_divergences(z, rate, votes, below))
    upper = np.sqrt(_divergences(z, rate, votes, above))
    lower, upper = np.maximum.accumulate(lower), np.maximum.accumulate(upper)

    def spanned(size: float) -> float:
        ends = np.interp(size, lower, below), np.interp(size, upper, above)
        return float(ends[1] - ends[0])

    low, high = math.sqrt(DROP / MOST), max(lower[-1], upper[-1])
    if spanned(low) > width:
        return None
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high) if high > low else low
        low, high = (middle, high) if spanned(middle) <= width else (low, middle)
    return _whole(DROP / low**2)


def _divergences(
    z: np.ndarray, rate: float, votes: int, others: np.ndarray
) -> np.ndarray:
    """D at other rates, by a golden-section search for their best temperatures."""
    truth = _chances(z, rate, 0.0, votes)
    e = others[:, None]

    def loss(x: np.ndarray) -> np.ndarray:
        parts = [
            p * np.log(p / q) for p, q in zip(truth, _chances(z, e, x[:, None], votes))
        ]
        return np.mean(sum(parts), axis=-1)

    ratio = (math.sqrt(5) - 1) / 2
    low, high = np.full(len(others), -LARGEST), np.full(len(others), LARGEST)
    for _ in range(HALVINGS):
        size = ratio * (high - low)
        first, second = high - size, low + size
        left = loss(first) < loss(second)
        low, high = np.where(left, low, first), np.where(left, second, high)
    return np.maximum(loss((low + high) / 2), 0.0)


def _chances(z: np.ndarray, e, x, votes: int) -> list[np.ndarray]:
    """P(a; e, 2^x) for a = 0 to k; the binomial coefficients are included."""
    first = sigmoid(z * np.exp2(-x))
    return [
        math.comb(votes, a)
        * (
            first * (1 - e) ** a * e ** (votes - a)
            + (1 - first) * (1 - e) ** (votes - a) * e**a
        )
        for a in range(votes + 1)
    ]
