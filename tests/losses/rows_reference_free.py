"""Rows of jaxpref/losses/_reference_free.py."""

import numpy as np

from jaxpref import losses
from tests.losses.row import Row, logistic


def log_odds(loss):
    """logit of exp(-loss): undoes a logistic loss."""
    return -np.log(np.expm1(loss))


ROWS = (
    Row(
        loss=losses.simpo,
        oracle=lambda pc, pr, chosen_lengths, rejected_lengths, *, beta, gamma: (
            logistic(beta / chosen_lengths * pc - beta / rejected_lengths * pr - gamma)
        ),
        defaults={"beta": 2.0, "gamma": 0.5},
        options=({}, {"beta": 10.0, "gamma": 3.0}, {"beta": 2.5, "gamma": 0.25}),
        # The margins of the two orders, after the target is taken off, sum to -2 gamma.
        mirror=lambda loss, swapped, *_, beta, gamma: (
            log_odds(loss) + log_odds(swapped) + 2 * gamma
        ),
    ),
)
