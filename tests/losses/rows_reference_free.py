"""Rows of jaxpref/losses/_reference_free.py."""

import numpy as np

from jaxpref import losses
from tests.losses.row import Row, logistic

PRECISE = {
    "policy_chosen_logps": (-8.0, -1.0),
    "policy_rejected_logps": (-8.0, -1.0),
}
"""Away from 0, where odds diverge, and where powers are moderate."""


def undone(loss):
    """logit of exp(-loss): inverts a logistic loss."""
    return -np.log(np.expm1(loss))


def target_mirror(loss, swapped, *_, gamma, **__):
    """The margins of the two orders, minus the target, sum to -2 gamma."""
    return undone(loss) + undone(swapped) + 2 * gamma


def alpha_po(pc, pr, chosen_lengths, rejected_lengths, *, alpha, beta, gamma):
    def reward(logps, lengths):
        average = logps / lengths
        if alpha == 0:
            return average
        # Clipped where p^-alpha exceeds exp(80).
        return (1 - np.exp(np.minimum(-alpha * average, 80))) / alpha

    margin = reward(pc, chosen_lengths) - reward(pr, rejected_lengths)
    return logistic(beta * margin - gamma)


def cpo(pc, pr, chosen_lengths, *, beta, nll_weight):
    return logistic(beta * pc - beta * pr) - nll_weight * pc / chosen_lengths


def log_odds(average):
    """log p / (1 - p), with p clipped at exp(-1e-6)."""
    average = np.minimum(average, -1e-6)
    return average - np.log(-np.expm1(average))


def odds_margin(pc, pr, chosen_lengths, rejected_lengths):
    return log_odds(pc / chosen_lengths) - log_odds(pr / rejected_lengths)


def orpo(pc, pr, chosen_lengths, rejected_lengths, *, beta):
    margin = odds_margin(pc, pr, chosen_lengths, rejected_lengths)
    return -pc / chosen_lengths + beta * logistic(margin)


def likelihood_margin(pc, pr, chosen_lengths, rejected_lengths):
    def falling(x):
        # x / (e^x - 1) is 1 at 0, and nearly 0 where e^x would overflow.
        x = np.where(x == 0, 1e-30, np.minimum(x, 1e4))
        return x / np.expm1(x)

    x_w, x_l = -pc / chosen_lengths, -pr / rejected_lengths
    return falling(x_w) - falling(x_l)


def mapo(pc, pr, chosen_lengths, rejected_lengths, *, beta, scale):
    margin = likelihood_margin(pc, pr, chosen_lengths, rejected_lengths)
    return -pc / chosen_lengths + beta * logistic(scale * margin)


def likelihoods(pc, pr, chosen_lengths, rejected_lengths):
    """The difference of the likelihood terms of the two orders."""
    return -pc / chosen_lengths + pr / rejected_lengths


ROWS = (
    Row(
        loss=losses.alpha_po,
        oracle=alpha_po,
        defaults={"alpha": 0.25, "beta": 2.5, "gamma": 0.25},
        options=(
            {},
            {"alpha": -1.0, "beta": 10.0, "gamma": 3.0},
            {"alpha": 0.0},
            {"alpha": 1e-6, "beta": 2.0, "gamma": 0.5},
            {"alpha": 0.5, "beta": 1.0, "gamma": 0.0},
        ),
        draw=PRECISE,
        # Next to exp(80), differences of losses lose all digits; see its own test.
        extremes=(8.0, -20.0, 4.0, -16.0),
        special=(({"alpha": 0.0, "beta": 2.0, "gamma": 0.5}, losses.simpo, {}),),
        mirror=target_mirror,
    ),
    Row(
        loss=losses.cpo,
        oracle=cpo,
        defaults={"beta": 0.1, "nll_weight": 1.0},
        options=({}, {"beta": 0.5, "nll_weight": 0.0}, {"beta": 1.0, "nll_weight": 2}),
        mirror=lambda loss, swapped, pc, pr, chosen_lengths, *, beta, nll_weight: (
            loss - swapped + (beta + nll_weight / chosen_lengths) * (pc - pr)
        ),
    ),
    Row(
        loss=losses.mapo,
        oracle=mapo,
        defaults={"beta": 0.1, "scale": 1.0},
        options=({}, {"beta": 1.0, "scale": 1000.0}, {"beta": 0.5, "scale": 4.0}),
        mirror=lambda loss, swapped, *a, beta, scale: (
            loss - swapped - likelihoods(*a) + beta * scale * likelihood_margin(*a)
        ),
    ),
    Row(
        loss=losses.orpo,
        oracle=orpo,
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        draw=PRECISE,
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped - likelihoods(*a) + beta * odds_margin(*a)
        ),
    ),
    Row(
        loss=losses.simpo,
        oracle=lambda pc, pr, chosen_lengths, rejected_lengths, *, beta, gamma: (
            logistic(beta / chosen_lengths * pc - beta / rejected_lengths * pr - gamma)
        ),
        defaults={"beta": 2.0, "gamma": 0.5},
        options=({}, {"beta": 10.0, "gamma": 3.0}, {"beta": 2.5, "gamma": 0.25}),
        mirror=target_mirror,
    ),
)
