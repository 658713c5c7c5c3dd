"""Rows of jaxpref/losses/_pairwise.py and _ipo.py."""

import numpy as np
from scipy.special import expit, log_expit

from jaxpref import losses
from tests.losses.row import (
    LOG2,
    MARGIN_SHIFTS,
    SIDE_SHIFTS,
    Row,
    log_ratio_margin,
    logistic,
    logistic_mirror,
    reward_margin,
)


def cal_dpo(policy_chosen, policy_rejected, *references, beta, calibration):
    chosen, rejected = policy_chosen - references[0], policy_rejected - references[1]
    distance = (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
    return logistic(chosen - rejected) + calibration * distance


def cal_dpo_mirror(loss, swapped, *arrays, beta, calibration):
    """-D, and c times the difference of the squares, -2 D / beta."""
    return loss - swapped + (1 + 2 * calibration / beta) * log_ratio_margin(*arrays)


def ipo_mirror(loss, swapped, *arrays, beta):
    return loss - swapped + 2 * log_ratio_margin(*arrays) / beta


def averaged_margin(pc, pr, rc, rr, chosen_lengths, rejected_lengths):
    return (pc - rc) / chosen_lengths - (pr - rr) / rejected_lengths


def hinge_mirror(loss, swapped, *arrays, beta):
    h = reward_margin(*arrays, beta=beta)
    return loss - swapped + h + np.clip(h, -1, 1)


def exo(*arrays, beta, label_smoothing):
    """KL of two distributions over {chosen, rejected}, the model's first."""
    h = reward_margin(*arrays, beta=beta)
    model = np.stack([expit(h), expit(-h)])
    log_model = np.stack([log_expit(h), log_expit(-h)])
    target = np.array([1 - label_smoothing, label_smoothing], h.dtype)
    log_target = np.log(target).reshape(2, *[1] * h.ndim)
    return (model * (log_model - log_target)).sum(0)


def exo_mirror(loss, swapped, *arrays, beta, label_smoothing):
    """The entropies are the same; the cross-entropies are not."""
    h = reward_margin(*arrays, beta=beta)
    odds = np.log1p(-label_smoothing) - np.log(label_smoothing)
    return loss - swapped + (expit(h) - expit(-h)) * odds


def log_ratio_modulated(h, tau):
    exponential = np.exp(log_expit(h / tau) - h)
    return (1 - expit(h / tau)) * logistic(h) + exponential


def discopop(*arrays, beta, tau):
    return log_ratio_modulated(reward_margin(*arrays, beta=beta), tau)


def discopop_mirror(loss, swapped, *arrays, beta, tau):
    h = reward_margin(*arrays, beta=beta)
    return loss - swapped - log_ratio_modulated(h, tau) + log_ratio_modulated(-h, tau)


JOINT_SHIFTS = tuple(
    tuple(name.replace("_logps", "_joint_logps") for name in names)
    for names in MARGIN_SHIFTS
)

ROWS = (
    Row(
        loss=losses.dpo,
        oracle=lambda *a, beta: logistic(reward_margin(*a, beta=beta)),
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: LOG2,
        mirror=logistic_mirror,
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.cal_dpo,
        oracle=cal_dpo,
        defaults={"beta": 0.002, "calibration": 0.5},
        options=({"beta": 0.1}, {"beta": 1.0, "calibration": 0.0}, {"beta": 0.05}),
        at_reference=lambda beta, calibration: LOG2 + calibration / (2 * beta**2),
        special=(({"calibration": 0.0}, losses.dpo, {"beta": 1.0}),),
        mirror=cal_dpo_mirror,
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.dove,
        oracle=lambda *a, beta: logistic(reward_margin(*a, beta=beta)),
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: LOG2,
        mirror=logistic_mirror,
        shifts=JOINT_SHIFTS,
    ),
    Row(
        loss=losses.hinge,
        oracle=lambda *a, beta: np.maximum(0, 1 - reward_margin(*a, beta=beta)),
        defaults={"beta": 0.05},
        options=({}, {"beta": 0.75}),
        at_reference=lambda **_: 1.0,
        mirror=hinge_mirror,
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.exo_pair,
        oracle=exo,
        defaults={"beta": 0.1, "label_smoothing": 1e-3},
        options=({}, {"label_smoothing": 0.25}, {"beta": 1.0, "label_smoothing": 0.1}),
        at_reference=lambda beta, label_smoothing: (
            -np.log(4 * label_smoothing * (1 - label_smoothing)) / 2
        ),
        mirror=exo_mirror,
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.discopop,
        oracle=discopop,
        defaults={"beta": 0.05, "tau": 0.05},
        options=({}, {"beta": 1.0}, {"beta": 0.1, "tau": 0.5}),
        at_reference=lambda **_: 0.5 + LOG2 / 2,
        mirror=discopop_mirror,
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.ipo,
        oracle=lambda *a, beta: (log_ratio_margin(*a) - 1 / (2 * beta)) ** 2,
        defaults={"beta": 0.1},
        options=({}, {"beta": 0.5}),
        at_reference=lambda beta: 1 / (2 * beta) ** 2,
        mirror=ipo_mirror,
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.ipo_averaged,
        oracle=lambda *a, beta: (averaged_margin(*a) - 1 / (2 * beta)) ** 2,
        defaults={"beta": 0.1},
        options=({}, {"beta": 0.5}),
        at_reference=lambda beta: 1 / (2 * beta) ** 2,
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped + 2 * averaged_margin(*a) / beta
        ),
        shifts=SIDE_SHIFTS,
    ),
)
