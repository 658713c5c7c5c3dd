"""Rows of jaxpref/losses/_sides.py and _asymmetric.py."""

import numpy as np
from scipy.special import expit

from jaxpref import losses
from tests.losses.row import (
    LOG2,
    SIDE_SHIFTS,
    Row,
    log_ratio_margin,
    log_ratios,
    logistic,
    logistic_mirror,
)


def nca(*arrays, beta):
    chosen, rejected = log_ratios(*arrays)
    data = logistic(beta * chosen)
    noise = logistic(-beta * chosen) / 2 + logistic(-beta * rejected) / 2
    return data + noise


def nca_mirror(loss, swapped, *arrays, beta):
    """The noise terms are the same; the data terms are exchanged."""
    chosen, rejected = log_ratios(*arrays)
    return loss - swapped - logistic(beta * chosen) + logistic(beta * rejected)


def apo_zero(*arrays, beta):
    chosen, rejected = log_ratios(*arrays)
    return 1 - expit(beta * chosen) + expit(beta * rejected)


def apo_down(*arrays, beta):
    chosen, rejected = log_ratios(*arrays)
    return expit(beta * chosen) + 1 - expit(beta * (chosen - rejected))


def apo_down_mirror(loss, swapped, *arrays, beta):
    chosen, rejected = log_ratios(*arrays)
    return loss + swapped - 1 - expit(beta * chosen) - expit(beta * rejected)


def sppo(*arrays, beta):
    chosen, rejected = log_ratios(*arrays)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def bco(*arrays, beta):
    chosen, rejected = log_ratios(*arrays)
    return logistic(beta * chosen) + logistic(-beta * rejected)


def dpop(policy_chosen, policy_rejected, chosen, rejected, *, beta, penalty):
    margin = (policy_chosen - chosen) - (policy_rejected - rejected)
    fall = np.maximum(0, chosen - policy_chosen)
    return logistic(beta * (margin - penalty * fall))


def log_odds(loss):
    """logit of exp(-loss): inverts a logistic loss of any size."""
    return -loss - np.log(-np.expm1(-loss))


def dpop_mirror(loss, swapped, *arrays, beta, penalty):
    """The two logits sum to minus the penalties of both answers."""
    chosen, rejected = log_ratios(*arrays)
    falls = np.maximum(-chosen, 0) + np.maximum(-rejected, 0)
    return log_odds(loss) + log_odds(swapped) + beta * penalty * falls


def flex(*arrays, chosen_beta, rejected_beta):
    chosen, rejected = log_ratios(*arrays)
    return logistic(chosen_beta * chosen - rejected_beta * rejected)


def flex_mirror(loss, swapped, *arrays, chosen_beta, rejected_beta):
    chosen, rejected = log_ratios(*arrays)
    both = (chosen_beta - rejected_beta) * (chosen + rejected)
    return log_odds(loss) + log_odds(swapped) - both


ROWS = (
    Row(
        loss=losses.nca_pair,
        oracle=nca,
        defaults={"beta": 0.01},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 2 * LOG2,
        mirror=nca_mirror,
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.apo_zero,
        oracle=apo_zero,
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 1.0,
        mirror=lambda loss, swapped, *_, **__: loss + swapped - 2,
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.apo_down,
        oracle=apo_down,
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 1.0,
        mirror=apo_down_mirror,
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.sppo_hard,
        oracle=sppo,
        defaults={"beta": 1e-3},
        options=({}, {"beta": 0.5}),
        at_reference=lambda beta: 2 / (2 * beta) ** 2,
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped + 2 * log_ratio_margin(*a) / beta
        ),
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.bco_pair,
        oracle=bco,
        defaults={"beta": 0.01},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 2 * LOG2,
        mirror=logistic_mirror,
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.dpop,
        oracle=dpop,
        defaults={"beta": 0.3, "penalty": 50.0},
        options=({}, {"penalty": 0.0}, {"beta": 0.1, "penalty": 2.0}),
        at_reference=lambda **_: LOG2,
        special=(({"beta": 0.1, "penalty": 0.0}, losses.dpo, {}),),
        mirror=dpop_mirror,
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.flex_dpo,
        oracle=flex,
        options=(
            {"chosen_beta": 0.1, "rejected_beta": 0.02},
            {"chosen_beta": 0.5, "rejected_beta": 1.0},
        ),
        at_reference=lambda **_: LOG2,
        special=(({"chosen_beta": 0.1, "rejected_beta": 0.1}, losses.dpo, {}),),
        mirror=flex_mirror,
        shifts=SIDE_SHIFTS,
    ),
)
