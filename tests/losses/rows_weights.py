"""Rows of jaxpref/losses/_weights.py."""

import numpy as np

from jaxpref import losses
from tests.losses.row import MARGIN_SHIFTS, Row, logistic, reward_margin


def wpo(*arrays, beta, frozen):
    *_, chosen, rejected = frozen
    weights = np.minimum(1, np.exp(chosen) * np.exp(rejected))
    return weights * logistic(reward_margin(*arrays, beta=beta))


def wpo_mirror(loss, swapped, *arrays, beta):
    """The weight is the same for both labels."""
    weights = np.minimum(1, np.exp(arrays[-2] + arrays[-1]))
    return loss - swapped + weights * reward_margin(*arrays, beta=beta)


ROWS = (
    Row(
        loss=losses.wpo,
        oracle=wpo,
        defaults={"beta": 0.01},
        options=({}, {"beta": 1.0}),
        # Above and below 1.
        draw={
            "chosen_log_weights": (-2.0, 2.0),
            "rejected_log_weights": (-1.0, 1.0),
        },
        mirror=wpo_mirror,
        shifts=MARGIN_SHIFTS,
    ),
)
