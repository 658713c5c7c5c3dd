"""Losses of lists on given log-probabilities, against equations in numpy."""

import itertools
import math

import numpy as np
import pytest

from jaxpref.errors import InputError
from jaxpref.objectives import irpo, lipo_lambda, plackett_luce
from tests.answers import one_weight

RNG = np.random.default_rng(1)
COUNTS = [4, 3, 2, 4, 2, 4, 3, 4]
THERE = np.arange(4) < np.array(COUNTS)[:, None]
LOGPS = np.where(THERE, -RNG.uniform(1, 9, (8, 4)), 0)
REFERENCE = np.where(THERE, LOGPS + RNG.normal(-1, 3, (8, 4)), 0)
QUALITIES = np.where(THERE, -np.sort(-RNG.integers(0, 3, (8, 4)), axis=1), 0.0)
QUALITIES[:, 0] += 1  # some answers tie, but not all of a list
BETA = 0.3
TOLERANCE = {"rtol": 3e-5, "atol": 3e-6}  # sums of a few float32 numbers


def of_plackett_luce(r, q):
    return sum(np.log(np.exp(r[i:]).sum()) - r[i] for i in range(len(r)))


def of_lipo(r, q):
    rank = [1 + sum(other > x for other in r) for x in r]
    total = 0.0
    for i, j in itertools.permutations(range(len(r)), 2):
        if q[i] > q[j]:
            apart = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
            total += abs(2 ** q[i] - 2 ** q[j]) * apart * np.logaddexp(0, r[j] - r[i])
    return total


def of_irpo(r, q):
    total = 0.0
    for i in range(len(r)):
        position = 1 + sum(other > q[i] for other in q)
        others = [np.exp(r[j] - r[i]) for j in range(len(r)) if j != i]
        total += (2 ** q[i] - 1) / math.log2(1 + position) * np.log1p(np.mean(others))
    return total / len(r)


CASES = {
    "plackett_luce": (plackett_luce, "ranks", of_plackett_luce),
    "lipo_lambda": (lipo_lambda, "qualities", of_lipo),
    "irpo": (irpo, "relevances", of_irpo),
}


def mean_loss(of_list, w):
    rewards = BETA * (w * LOGPS - REFERENCE)
    return np.mean(
        [of_list(r[:n], q[:n]) for r, q, n in zip(rewards, QUALITIES, COUNTS)]
    )


def ndcg_of(r, q):
    """Of rewards and qualities without ties among the rewards."""
    others = len(q) - 1
    gain = [2 ** (sum(x > y for y in q) / others) - 1 for x in q]
    dcg = lambda order: sum(gain[i] / math.log2(2 + n) for n, i in enumerate(order))
    by = lambda x: sorted(range(len(q)), key=lambda i: -x[i])
    return dcg(by(r)) / dcg(by(gain))


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_metrics(name):
    make, label, of_list = CASES[name]
    numbers = np.where(THERE, np.arange(1, 5), 0) if label == "ranks" else QUALITIES
    objective = make(beta=BETA)
    grad, _, metrics = one_weight(
        objective, LOGPS, REFERENCE, {label: numbers}, accumulation=2
    )
    np.testing.assert_allclose(metrics["loss"], mean_loss(of_list, 1), **TOLERANCE)
    # Ranks and so the weights do not change nearby: a central difference in float64.
    derivative = (mean_loss(of_list, 1 + 1e-6) - mean_loss(of_list, 1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(grad, derivative, rtol=1e-4)
    rewards = BETA * (LOGPS - REFERENCE)
    order = -numbers if label == "ranks" else numbers
    share, gains, worst = [], [], []
    for r, q, n in zip(rewards, order, COUNTS):
        pairs = [(i, j) for i in range(n) for j in range(n) if q[i] > q[j]]
        share.append(np.mean([r[i] > r[j] for i, j in pairs]))
        gains.append(ndcg_of(r[:n], q[:n]))
        worst.append(r[n - 1])
    expected = {
        "rewards/accuracies": np.mean(share),
        "rewards/ndcg": np.mean(gains),
        "rewards/best": rewards[:, 0].mean(),
        "rewards/worst": np.mean(worst),
        "rewards/margins": rewards[:, 0].mean() - np.mean(worst),
        "logps/best": LOGPS[:, 0].mean(),
    }
    for key, number in expected.items():
        np.testing.assert_allclose(metrics[key], number, **TOLERANCE, err_msg=key)


def test_options_are_checked():
    for make in (plackett_luce, lipo_lambda, irpo):
        with pytest.raises(InputError, match="Expected beta > 0"):
            make(beta=0.0)
