"""The experiment with exact policies: its noise, optima, and matched KL."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, softmax

from experiments import heterogeneous_noise as experiment

WORLD = experiment.make_world(7)


@pytest.mark.parametrize("noise", experiment.NOISES)
def test_labels_have_the_rates_that_are_stated(noise):
    """By the likelihood of the labels of many pairs, in bins of the true margin."""
    pairs = experiment.draw_pairs(WORLD, 40_000, noise, seed=7)
    # The direction of the reward, from the features of all answers.
    reward = np.linalg.lstsq(WORLD.features, WORLD.reward, rcond=None)[0]
    z = pairs.features @ reward
    e, swapped = experiment.true_rates(pairs, noise)
    p = (1 - e) * expit(z) + swapped * expit(-z)
    other = (1 - swapped) * expit(-z) + e * expit(z)
    np.testing.assert_allclose(p + other, 1)
    # P(label) is the mean of 1 over labels in which the label and its opposite occur:
    # the mean of 1 / p over observed labels is the number of possible labels, 2, where
    # both are possible.
    both = (p > 1e-9) & (other > 1e-9)
    assert (1 / p[both]).mean() == pytest.approx(2, abs=0.05)
    assert (p[~both] > 0.5).all()  # what cannot happen does not


def test_rewards_are_compared_at_the_stated_kl():
    """For the true reward: no policy of this KL has more of it."""
    best = experiment.at_matched_kl(WORLD.reward, WORLD.reward)
    found = minimize(
        lambda c: (kl_of(softmax(c[0] * WORLD.reward)) - experiment.KL) ** 2,
        [0.5],
        method="Nelder-Mead",
    )
    assert best == pytest.approx(
        softmax(found.x[0] * WORLD.reward) @ WORLD.reward, 1e-3
    )
    shifted = WORLD.reward + 0.3 * WORLD.log_length
    assert experiment.at_matched_kl(shifted, WORLD.reward) < best
    assert experiment.at_matched_kl(5 * shifted, WORLD.reward) == pytest.approx(
        experiment.at_matched_kl(shifted, WORLD.reward)
    )


def kl_of(policy):
    return np.sum(policy * np.log(policy * experiment.ANSWERS))


def test_the_policy_for_known_rates_is_the_optimum():
    pairs = experiment.draw_pairs(WORLD, 300, "half by length", seed=1)
    e, swapped = experiment.true_rates(pairs, "half by length")
    ours = experiment.fit_known(pairs, e, swapped, ridge=20.0)

    def cost(theta):
        z = pairs.features @ theta
        p = (1 - e) * expit(z) + swapped * expit(-z)
        gradient = -(1 - e - swapped) * expit(z) * expit(-z) / p
        value = -np.log(p).sum() + 10 * theta @ theta
        return value, pairs.features.T @ gradient + 20 * theta

    theirs = minimize(cost, 0 * ours, jac=True, method="BFGS").x
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_learning_rates_of_annotators_finds_an_adversary():
    pairs = experiment.draw_pairs(WORLD, 2000, "adversary", seed=3)
    reward = lambda theta: experiment.at_matched_kl(
        WORLD.features @ theta, WORLD.reward
    )
    options = {"ridge": 30.0, "length": False}
    learned = experiment.fit_learned(pairs, **options, annotators=True)
    pooled = experiment.fit_learned(pairs, **options, annotators=False)
    assert reward(learned) > reward(pooled) + 0.05
