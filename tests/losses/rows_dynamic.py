"""Rows of jaxpref/losses/_dynamic_beta.py and _dynamic_targets.py."""

import numpy as np
from scipy.special import expit

from jaxpref import losses
from tests.losses.row import (
    LOG2,
    MARGIN_SHIFTS,
    Row,
    log_ratio_margin,
    logistic,
    reward_margin,
)


def beta_dpo(*arrays, beta, alpha, frozen):
    held = log_ratio_margin(*frozen).mean()
    batch_beta = max(1e-3, beta * (1 + alpha * (held - frozen[-1])))
    return logistic(batch_beta * log_ratio_margin(*arrays))


def targets(margins, gamma, tau):
    """gamma N p at the minimum of mean -log s(h - gamma N p) + tau KL(p || uniform).

    By damped Newton steps on p and the multiplier of sum p = 1, in wide floats.
    """
    n = margins.size
    p = np.full(n, 1 / np.longdouble(n))

    def objective(p):
        return logistic(margins - gamma * n * p).mean() + tau * (p @ np.log(n * p))

    for _ in range(200):
        wrong = expit(gamma * n * p - margins)
        gradient = gamma * wrong + tau * (1 + np.log(n * p))
        curvature = gamma**2 * n * wrong * (1 - wrong) + tau / p
        level = (gradient / curvature).sum() / (1 / curvature).sum()
        step = (level - gradient) / curvature
        size = np.longdouble(1)
        while (p + size * step <= 0).any():
            size /= 2
        while size > 1e-6 and objective(p + size * step) > objective(p):
            size /= 2
        p = p + size * step
        if abs(step).max() < 1e-22:
            break
    assert (
        abs(gradient - level).max() < 1e-12 * (1 + abs(level))
        and abs(p.sum() - 1) < 1e-15
    )
    return gamma * n * p


def gamma_po(*arrays, beta, gamma, tau, frozen):
    held = targets(reward_margin(*frozen, beta=beta), gamma, tau)
    return logistic(reward_margin(*arrays, beta=beta) - (held - gamma))


def average_margin(chosen, rejected, chosen_lengths, rejected_lengths, *, beta):
    return beta * (chosen / chosen_lengths - rejected / rejected_lengths)


def gamma_simpo(*arrays, beta, gamma, tau, frozen):
    held = targets(average_margin(*frozen, beta=beta), gamma, tau)
    return logistic(average_margin(*arrays, beta=beta) - held)


ROWS = (
    Row(
        loss=losses.beta_dpo,
        oracle=beta_dpo,
        defaults={"beta": 0.1, "alpha": 0.6},
        options=({}, {"alpha": 50.0}, {"beta": 1.0, "alpha": 0.05}),
        at_reference=lambda **_: LOG2,
        special=(({"alpha": 0}, losses.dpo, {}),),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.gamma_po,
        oracle=gamma_po,
        defaults={"beta": 0.1, "tau": 10.0},
        options=(
            {"gamma": 1.0},
            {"gamma": 0},
            {"gamma": 1.0, "tau": 0.1},
            {"beta": 1.0, "gamma": 2.0, "tau": 3.0},
        ),
        at_reference=lambda **_: LOG2,
        special=(
            ({"gamma": 0}, losses.dpo, {}),
            ({"gamma": 1.0, "tau": 1e13}, losses.dpo, {}),
        ),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.gamma_simpo,
        oracle=gamma_simpo,
        defaults={"beta": 10.0, "gamma": 4.0, "tau": 10.0},
        options=({}, {"beta": 2.0, "gamma": 0.5, "tau": 1.0}),
        special=(
            (
                {"beta": 2.5, "tau": 1e14},
                losses.simpo,
                {"beta": 2.5, "gamma": 4.0},
            ),
        ),
    ),
)
