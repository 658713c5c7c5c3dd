"""Rows of jaxpref/losses/_symmetric.py."""

import numpy as np
from scipy.special import expit

from jaxpref import losses
from tests.losses.row import MARGIN_SHIFTS, Row, reward_margin


def sigmoid(*arrays, beta):
    return expit(-reward_margin(*arrays, beta=beta))


def ramp(*arrays, beta):
    return np.minimum(1, np.maximum(0, (1 - reward_margin(*arrays, beta=beta)) / 2))


def power(*arrays, beta, power):
    return (1 - expit(reward_margin(*arrays, beta=beta)) ** power) / power


def holder(*arrays, beta, gamma):
    """phi(E_p q^gamma / E_q q^gamma) E_q q^gamma, both means over the sample."""
    q = expit(reward_margin(*arrays, beta=beta))
    return gamma * q ** (1 + gamma) - (1 + gamma) * q**gamma


def sums_to(constant):
    """The symmetry of a symmetric loss: loss(h) + loss(-h) is this constant."""
    return lambda loss, swapped, *_, **__: loss + swapped - constant


ROWS = (
    Row(
        loss=losses.holder_dpo,
        oracle=holder,
        defaults={"beta": 0.1, "gamma": 2.0},
        options=({}, {"beta": 1.0, "gamma": 0.5}),
        at_reference=lambda gamma, **_: (
            gamma / 2 ** (1 + gamma) - (1 + gamma) / 2**gamma
        ),
        # s^2 (2 s - 3), a polynomial with its center of symmetry at s = 1/2.
        mirror=lambda loss, swapped, *a, beta, gamma: (
            loss + swapped + 1 if gamma == 2 else 0
        ),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.power_dpo,
        oracle=power,
        defaults={"beta": 0.1, "power": 0.7},
        options=({}, {"beta": 1.0, "power": 0.25}),
        at_reference=lambda power, **_: (1 - 0.5**power) / power,
        special=(
            ({"beta": 1.0, "power": 1.0}, losses.sympo_sigmoid, {"beta": 1.0}),
            ({"beta": 1.0, "power": 1e-14}, losses.dpo, {"beta": 1.0}),
        ),
        # The two labels' probabilities sum to 1.
        mirror=lambda loss, swapped, *_, beta, power: (
            (1 - power * loss) ** (1 / power) + (1 - power * swapped) ** (1 / power) - 1
        ),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.sympo_ramp,
        oracle=ramp,
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 0.5,
        mirror=sums_to(1),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.sympo_sigmoid,
        oracle=sigmoid,
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 0.5,
        mirror=sums_to(1),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.sympo_unhinged,
        oracle=lambda *a, beta: 1 - reward_margin(*a, beta=beta),
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: 1.0,
        mirror=sums_to(2),
        shifts=MARGIN_SHIFTS,
    ),
)
