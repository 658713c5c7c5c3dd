"""Rows of jaxpref/losses/_divergence.py."""

import numpy as np
from scipy.special import log_expit

from jaxpref import losses
from tests.losses.row import FOUR, LOG2, SIDE_SHIFTS, Row, log_ratios, logistic

# exp(log-ratio) below exp(2): float32 can tell the difference of two of them.
NEAR = {name: (-2.0, 0.0) for name in FOUR}
# Even long double cannot resolve the rejected answer's gradient next to exp(1e4):
# test_divergence.py goes there.
TAME_EXTREMES = (1e4, -10.0, 1e3, -6.0, 30.0, -4.0)


def forward_kl(u, **_):
    return -1 / u


def jensen_shannon(u, **_):
    return np.log(2 * u / (1 + u))


def alpha_divergence(u, alpha):
    return (1 - u**-alpha) / alpha


def margin_of(derivative, *arrays, beta, **options):
    """beta f'(u_w) - beta f'(u_l), as the paper has it: in probability ratios."""
    chosen, rejected = (np.exp(ratio) for ratio in log_ratios(*arrays))
    chosen, rejected = (derivative(u, **options) for u in (chosen, rejected))
    return beta * chosen - beta * rejected


def f_row(loss, derivative, **fields):
    return Row(
        loss=loss,
        oracle=lambda *a, **o: logistic(margin_of(derivative, *a, **o)),
        defaults={"beta": 0.1},
        at_reference=lambda **_: LOG2,
        mirror=lambda value, swapped, *a, **o: (
            value - swapped + margin_of(derivative, *a, **o)
        ),
        shifts=SIDE_SHIFTS,
        **fields,
    )


def js_margin(*arrays, beta):
    """In logs: u overflows at the extremes, log u does not."""
    chosen, rejected = (LOG2 + log_expit(ratio) for ratio in log_ratios(*arrays))
    return beta * chosen - beta * rejected


def chi_logit(*arrays, beta, max_reward):
    chosen, rejected = log_ratios(*arrays)
    # The exponent is clipped as in the code.
    links = [np.exp(np.minimum(ratio, 80)) + ratio for ratio in (chosen, rejected)]
    return np.clip(beta * links[0] - beta * links[1], -2 * max_reward, 2 * max_reward)


ROWS = (
    f_row(
        losses.forward_kl_dpo,
        forward_kl,
        options=({}, {"beta": 0.5}),
        draw=NEAR,
        extremes=TAME_EXTREMES,
    ),
    Row(
        loss=losses.js_dpo,
        oracle=lambda *a, beta: logistic(js_margin(*a, beta=beta)),
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: LOG2,
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped + margin_of(jensen_shannon, *a, beta=beta)
        ),
        shifts=SIDE_SHIFTS,
    ),
    f_row(
        losses.alpha_dpo,
        alpha_divergence,
        options=({"alpha": 0.3}, {"beta": 0.5, "alpha": 0.7}),
        draw=NEAR,
        extremes=TAME_EXTREMES,
        special=(
            ({"alpha": 1e-13}, losses.dpo, {}),
            ({"alpha": 1 - 2.0**-50}, losses.forward_kl_dpo, {}),
        ),
    ),
    Row(
        loss=losses.chi_po,
        oracle=lambda *a, **options: logistic(chi_logit(*a, **options)),
        defaults={"beta": 0.05},
        options=({"max_reward": 1.0}, {"beta": 0.5, "max_reward": 10.0}),
        draw=NEAR,
        at_reference=lambda **_: LOG2,
        mirror=lambda loss, swapped, *a, **options: (
            loss - swapped + chi_logit(*a, **options)
        ),
        shifts=SIDE_SHIFTS,
    ),
)
