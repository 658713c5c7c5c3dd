"""Rows of jaxpref/losses/_robust.py."""

import numpy as np
from scipy.special import expit, log_expit, logsumexp

from jaxpref import losses
from tests.losses.row import LOG2, MARGIN_SHIFTS, Row, logistic, reward_margin


def flip_options(*rates):
    return tuple({"beta": b, "flip_rate": e} for b in (0.1, 1.0) for e in rates)


def forward_dpo(*arrays, beta, flip_rate):
    h = reward_margin(*arrays, beta=beta)
    weights = np.array([1 - flip_rate, flip_rate]).reshape(2, *[1] * h.ndim)
    terms = np.stack([log_expit(h), log_expit(-h)])
    return -logsumexp(terms, axis=0, b=weights)


def cdpo(*arrays, beta, flip_rate):
    h = reward_margin(*arrays, beta=beta)
    return (1 - flip_rate) * logistic(h) + flip_rate * logistic(-h)


def rdpo(*arrays, beta, flip_rate):
    h = reward_margin(*arrays, beta=beta)
    difference = (1 - flip_rate) * logistic(h) - flip_rate * logistic(-h)
    return difference / (1 - 2 * flip_rate)


def ropo(*arrays, beta, alpha):
    h = reward_margin(*arrays, beta=beta)
    tolerant = 4 * alpha**2 / (1 + alpha) ** 2 * expit(-h)
    return 4 * alpha / (1 + alpha) ** 2 * logistic(h) + tolerant


def ropo_mirror(loss, swapped, *arrays, beta, alpha):
    h = reward_margin(*arrays, beta=beta)
    return loss - swapped + 4 * alpha / (1 + alpha) ** 2 * (h + alpha * np.tanh(h / 2))


ROWS = (
    Row(
        loss=losses.cdpo,
        oracle=cdpo,
        defaults={"beta": 0.1},
        options=flip_options(0.0, 0.1, 0.4),
        at_reference=lambda **_: LOG2,
        base=losses.dpo,
        mirror=lambda loss, swapped, *a, beta, flip_rate: (
            loss - swapped + (1 - 2 * flip_rate) * reward_margin(*a, beta=beta)
        ),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.rdpo,
        oracle=rdpo,
        defaults={"beta": 0.1},
        options=flip_options(0.0, 0.1, 0.4),
        at_reference=lambda **_: LOG2,
        base=losses.dpo,
        mirror=lambda loss, swapped, *a, beta, flip_rate: (
            loss - swapped + reward_margin(*a, beta=beta) / (1 - 2 * flip_rate)
        ),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.forward_dpo,
        oracle=forward_dpo,
        defaults={"beta": 0.1},
        options=flip_options(0.0, 0.1, 0.4),
        at_reference=lambda **_: LOG2,
        base=losses.dpo,
        # The two labels' probabilities sum to 1.
        mirror=lambda loss, swapped, *_, **__: np.exp(-loss) + np.exp(-swapped) - 1,
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.ropo,
        oracle=ropo,
        defaults={"beta": 0.1, "alpha": 14.0},
        options=({}, {"beta": 1.0, "alpha": 2.0}),
        at_reference=lambda alpha, **_: (
            4 * alpha / (1 + alpha) ** 2 * (LOG2 + alpha / 2)
        ),
        mirror=ropo_mirror,
        shifts=MARGIN_SHIFTS,
    ),
)
