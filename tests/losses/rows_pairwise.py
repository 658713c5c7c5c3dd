"""Rows of jaxpref/losses/_pairwise.py."""

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


def ipo_mirror(loss, swapped, *arrays, beta):
    return loss - swapped + 2 * log_ratio_margin(*arrays) / beta


def averaged_margin(pc, pr, rc, rr, chosen_lengths, rejected_lengths):
    return (pc - rc) / chosen_lengths - (pr - rr) / rejected_lengths


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
