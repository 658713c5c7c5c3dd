"""KTO, BCO and APO-zero on given log-probabilities, against equations in numpy."""

import numpy as np
import pytest
from scipy.special import expit

from jaxpref.errors import InputError
from jaxpref.objectives import apo_zero_unpaired, bco, kto
from tests.answers import one_weight

RNG = np.random.default_rng(0)
LOGPS = -RNG.uniform(1, 9, (8, 2))
REFERENCE = LOGPS + RNG.normal(-1, 3, (8, 2))
LIKED = RNG.random(8) < 0.5
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # sums of a few float32 numbers


def step(objective, *, sign=1.0, labels=LIKED, **options):
    """One step; `sign` -1 exchanges policy and reference, which turns z around."""
    sides = objective.num_completions
    ratio = sign * (LOGPS - REFERENCE)[:, :sides]
    logps = LOGPS[:, :sides]
    found = one_weight(
        objective, logps, logps - ratio, {"desirable": labels}, **options
    )
    return ratio, logps[:, 0], found


@pytest.mark.parametrize(("sign", "accumulation"), [(1.0, 1), (1.0, 4), (-1.0, 1)])
def test_kto(sign, accumulation):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    objective = kto(beta=0.3, **weights)
    ratio, logps, (grad, _, metrics) = step(
        objective, sign=sign, accumulation=accumulation
    )
    z = max(ratio[:, 1].mean(), 0)
    assert (z == 0) == (sign < 0)
    value = 0.3 * (ratio[:, 0] - z) * np.where(LIKED, 1, -1)
    weight = np.where(LIKED, 1.5, 0.5)
    # z is a constant: the derivative of a by w is the log-probability.
    derivative = weight * expit(value) * expit(-value) * np.where(LIKED, -0.3, 0.3)
    np.testing.assert_allclose(grad, (derivative * logps).mean(), **TOLERANCE)
    np.testing.assert_allclose(
        metrics["loss"], (weight * expit(-value)).mean(), **TOLERANCE
    )
    rewards = 0.3 * ratio[:, 0]
    expected = {
        "kl": z,
        "rewards/desirable": rewards[LIKED].mean(),
        "rewards/undesirable": rewards[~LIKED].mean(),
        "rewards/margins": rewards[LIKED].mean() - rewards[~LIKED].mean(),
        "rewards/accuracies": ((ratio[:, 0] > z) == LIKED).mean(),
        "logps/desirable": logps[LIKED].mean(),
        "logps/undesirable": logps[~LIKED].mean(),
    }
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_bco_and_its_moving_shift(accumulation):
    objective = bco(beta=0.3, momentum=0.8)
    ratio, logps, (grad, state, metrics) = step(objective, accumulation=accumulation)
    rewards = 0.3 * ratio[:, 0]
    midway = (rewards[LIKED].mean() + rewards[~LIKED].mean()) / 2
    sign = np.where(LIKED, 1, -1)

    def check(shift, grad, metrics):
        value = sign * (rewards - shift)
        loss, derivative = -np.log(expit(value)), -sign * 0.3 * expit(-value)
        np.testing.assert_allclose(metrics["loss"], loss.mean(), **TOLERANCE)
        np.testing.assert_allclose(grad, (derivative * logps).mean(), **TOLERANCE)
        np.testing.assert_allclose(metrics["bco/shift"], shift, **TOLERANCE)
        right = ((rewards > shift) == LIKED).mean()
        np.testing.assert_allclose(metrics["rewards/accuracies"], right)

    check(midway, grad, metrics)
    # The next batch has other labels: the average has weights 0.8 and 1.
    other = ~LIKED
    other[:2] = True
    _, _, (grad, state, metrics) = step(objective, labels=other, state=state)
    second = (rewards[other].mean() + rewards[~other].mean()) / 2
    sign = np.where(other, 1, -1)
    average = (0.8 * midway + second) / 1.8
    value = sign * (rewards - average)
    np.testing.assert_allclose(
        metrics["loss"], -np.log(expit(value)).mean(), **TOLERANCE
    )
    # A batch of one class changes nothing.
    _, _, (_, after, metrics) = step(objective, labels=np.ones(8, bool), state=state)
    np.testing.assert_allclose(metrics["bco/shift"], average, **TOLERANCE)
    for name in state:
        np.testing.assert_allclose(after[name], state[name], rtol=1e-6)


def test_apo_zero():
    ratio, logps, (grad, _, metrics) = step(apo_zero_unpaired(beta=0.3))
    value = 0.3 * ratio[:, 0] * np.where(LIKED, 1, -1)
    np.testing.assert_allclose(metrics["loss"], expit(-value).mean(), **TOLERANCE)
    derivative = expit(value) * expit(-value) * np.where(LIKED, -0.3, 0.3)
    np.testing.assert_allclose(grad, (derivative * logps).mean(), **TOLERANCE)
    right = ((ratio[:, 0] > 0) == LIKED).mean()
    np.testing.assert_allclose(metrics["rewards/accuracies"], right)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (kto, {"beta": 0.0}, "loss kto: Expected beta > 0"),
        (kto, {"desirable_weight": -1.0}, "desirable_weight >= 0"),
        (bco, {"beta": -1.0}, "loss bco: Expected beta > 0"),
        (bco, {"momentum": 1.0}, r"loss bco: momentum 1.0: must be in \[0, 1\)"),
        (apo_zero_unpaired, {"beta": 0.0}, "Expected beta > 0"),
    ],
)
def test_options_are_checked(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)
