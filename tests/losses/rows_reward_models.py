"""Rows of jaxpref/losses/_reward_models.py."""

import numpy as np
from scipy.special import logsumexp

from jaxpref import losses
from tests.losses.row import Row, logistic

SHIFTS = (("chosen_rewards", "rejected_rewards"),)
"""Arrays whose common shift comparisons cannot detect."""


def rao_kupper(chosen, rejected, ties, *, theta):
    """Rao and Kupper, 1967: of two worths, log pi = r."""
    log = np.log(np.asarray(theta, np.longdouble))
    first = np.logaddexp(chosen, log + rejected)  # pi_1 + theta pi_2
    second = np.logaddexp(log + chosen, rejected)  # theta pi_1 + pi_2
    win = chosen - first
    tie = np.log(theta * theta - 1) + chosen + rejected - first - second
    return -(1 - ties) * win - ties * tie


def davidson(chosen, rejected, ties, *, nu):
    """Davidson, 1970: of two worths, log pi = r."""
    tie = np.log(np.asarray(nu, np.longdouble)) + 0.5 * (chosen + rejected)
    total = logsumexp(np.stack([chosen, rejected, tie]), axis=0)
    return -(1 - ties) * (chosen - total) - ties * (tie - total)


def chosen_wins(loss, swapped, chosen, rejected, ties, **_):
    """Swapping exchanges win and loss but not a tie, which leaves the odds."""
    return loss - swapped + (1 - ties) * (chosen - rejected)


def thresholds_differ(loss, swapped, chosen, rejected, ties, *, theta):
    """The odds of a win are not exp(d): Rao and Kupper break Luce's axiom."""
    up, down = (
        logistic(sign * (chosen - rejected) - np.log(theta)) for sign in (1, -1)
    )
    return loss - swapped - (1 - ties) * (up - down)


ROWS = (
    Row(
        loss=losses.bradley_terry,
        oracle=lambda chosen, rejected: logistic(chosen - rejected),
        mirror=lambda loss, swapped, chosen, rejected: (
            loss - swapped + chosen - rejected
        ),
        shifts=SHIFTS,
    ),
    Row(
        loss=losses.margin_bradley_terry,
        oracle=lambda chosen, rejected, margins: logistic(chosen - rejected - margins),
        # The log odds of the two orders sum to -2 m.
        mirror=lambda loss, swapped, chosen, rejected, margins: (
            np.log(np.expm1(loss)) + np.log(np.expm1(swapped)) - 2 * margins
        ),
        shifts=SHIFTS,
    ),
    Row(
        loss=losses.scaled_bradley_terry,
        oracle=lambda chosen, rejected, strengths: (
            strengths * logistic(chosen - rejected)
        ),
        mirror=lambda loss, swapped, chosen, rejected, strengths: (
            loss - swapped + strengths * (chosen - rejected)
        ),
        shifts=SHIFTS,
    ),
    Row(
        loss=losses.rao_kupper,
        oracle=rao_kupper,
        defaults={"theta": 3.0},
        options=({}, {"theta": 1.25}),
        mirror=thresholds_differ,
        shifts=SHIFTS,
    ),
    Row(
        loss=losses.davidson,
        oracle=davidson,
        defaults={"nu": 2.0},
        options=({}, {"nu": 0.25}),
        mirror=chosen_wins,
        shifts=SHIFTS,
    ),
    Row(
        loss=losses.center_rewards,
        oracle=lambda chosen, rejected: (chosen + rejected) ** 2,
        mirror=lambda loss, swapped, *_: loss - swapped,
    ),
)
