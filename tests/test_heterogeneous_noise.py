"""The experiment with exact policies: its noise, optima, and matched KL."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, softmax

from experiments import heterogeneous_noise as experiment
from experiments import heterogeneous_world as worlds
from jaxpref import losses

WORLD = worlds.make_world(7)
draw = lambda noise, count, seed: worlds.draw_pairs(
    WORLD, count, worlds.NOISES[noise], seed
)


@pytest.mark.parametrize("noise", worlds.NOISES)
def test_labels_have_the_rates_that_are_stated(noise):
    """By the likelihood of the labels of many pairs, in bins of the true margin."""
    pairs = draw(noise, 40_000, 7)
    # The direction of the reward, from the features of all answers.
    reward = np.linalg.lstsq(WORLD.features, WORLD.reward, rcond=None)[0]
    z, e, swapped = pairs.features @ reward, pairs.rate, pairs.other_rate
    p = (1 - e) * expit(z) + swapped * expit(-z)
    other = (1 - swapped) * expit(-z) + e * expit(z)
    np.testing.assert_allclose(p + other, 1)
    # P(label) is the mean of 1 over labels in which the label and its opposite occur:
    # the mean of 1 / p over observed labels is the number of possible labels, 2, where
    # both are possible.
    both = (p > 1e-9) & (other > 1e-9)
    assert (1 / p[both]).mean() == pytest.approx(2, abs=0.05)
    assert (p[~both] > 0.5).all()  # what cannot happen does not


def test_the_rates_of_each_noise_are_those_of_its_description():
    mean = lambda noise, where: (
        np.mean((noise.rate + noise.other_rate)[where(noise)]) / 2
    )
    all_of = lambda pairs: np.ones(len(pairs.rate), bool)
    second = lambda pairs: pairs.annotator == 1
    on = lambda pairs: pairs.topic == 1
    expected = {
        "symmetric": [(all_of, 0.25)],
        "hard pairs": [(all_of, 0.25)],
        "two annotators": [(second, 0.4), (lambda pairs: ~second(pairs), 0.05)],
        "adversary": [(second, 0.8), (lambda pairs: ~second(pairs), 0.0)],
        "topic": [(on, 0.8), (lambda pairs: ~on(pairs), 0.0)],
        "half by position": [(all_of, 0.25)],
        "by class": [(all_of, 0.225)],
        "half by length": [(second, 0.5), (lambda pairs: ~second(pairs), 0.0)],
    }
    assert expected.keys() == worlds.NOISES.keys()
    for noise, parts in expected.items():
        pairs = draw(noise, 4000, 1)
        for where, rate in parts:
            assert mean(pairs, where) == pytest.approx(rate, abs=1e-6), noise
    # Biased labels prefer what they are said to prefer.
    assert (draw("half by position", 4000, 1).position > 0).mean() > 0.6
    assert (draw("by class", 4000, 1).length > 0).mean() > 0.55


def test_rewards_are_compared_at_the_stated_kl():
    """For the true reward: no policy of this KL has more of it."""
    best = worlds.at_matched_kl(WORLD.reward, WORLD.reward)
    found = minimize(
        lambda c: (kl_of(softmax(c[0] * WORLD.reward)) - worlds.KL) ** 2,
        [0.5],
        method="Nelder-Mead",
    )
    assert best == pytest.approx(
        softmax(found.x[0] * WORLD.reward) @ WORLD.reward, 1e-3
    )
    shifted = WORLD.reward + 0.3 * WORLD.log_length
    assert worlds.at_matched_kl(shifted, WORLD.reward) < best
    assert worlds.at_matched_kl(5 * shifted, WORLD.reward) == pytest.approx(
        worlds.at_matched_kl(shifted, WORLD.reward)
    )


def kl_of(policy):
    return np.sum(policy * np.log(policy * worlds.ANSWERS))


def test_the_policy_for_known_rates_is_the_optimum():
    pairs = draw("half by length", 300, 1)
    e, swapped = pairs.rate, pairs.other_rate
    ours = experiment.fit(pairs.features, experiment.forward(e, swapped), ridge=20.0)

    def cost(theta):
        z = pairs.features @ theta
        p = (1 - e) * expit(z) + swapped * expit(-z)
        gradient = -(1 - e - swapped) * expit(z) * expit(-z) / p
        value = -np.log(p).sum() + 10 * theta @ theta
        return value, pairs.features.T @ gradient + 20 * theta

    theirs = minimize(cost, 0 * ours, jac=True, method="BFGS").x
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize(
    ("method", "loss"), [("ROPO", "ropo"), ("Dr. DPO", "dr_dpo"), ("CRM", None)]
)
def test_robust_policies_are_stationary(method, loss):
    """The gradient of the library's own loss, with the penalty, vanishes."""
    pairs, ridge = draw("symmetric", 300, 1), 30.0
    if loss is None:  # CRM that drops nothing is the mean of two DPO policies
        ours = experiment.fit_by_peers(pairs, ridge, 0.0)
        dpo = experiment.fit(pairs.features, experiment.dpo, ridge=ridge)
        np.testing.assert_allclose(ours, dpo, atol=1e-5)
        return
    (found,) = (x for x in experiment.METHODS if x.name == method)
    value = found.settings[1]
    theta = found.policy(pairs, ridge, value)
    name = {"ropo": "alpha", "dr_dpo": "beta_prime"}[loss]
    with jax.enable_x64(True):
        x, zero = jnp.asarray(pairs.features), jnp.zeros(300)
        given = functools.partial(getattr(losses, loss), beta=1.0, **{name: value})
        cost = lambda theta: jnp.sum(given(x @ theta, zero, zero, zero))
        gradient = jax.grad(cost)(jnp.asarray(theta)) + ridge * theta
        np.testing.assert_allclose(gradient, 0, atol=0.05)
    assert np.abs(ridge * theta).max() > 1


def test_learning_rates_of_annotators_finds_an_adversary():
    pairs = draw("adversary", 2000, 3)
    reward = lambda theta: worlds.at_matched_kl(WORLD.features @ theta, WORLD.reward)
    learned = experiment.fit_learned(pairs, 30.0, annotators=True)
    pooled = experiment.fit_learned(pairs, 30.0, annotators=False)
    assert reward(learned) > reward(pooled) + 0.05


@pytest.mark.parametrize(
    ("noise", "cause"), [("topic", "topic"), ("half by position", "position")]
)
def test_learning_the_cause_of_the_noise_helps(noise, cause):
    pairs = draw(noise, 2000, 3)
    reward = lambda theta: worlds.at_matched_kl(WORLD.features @ theta, WORLD.reward)
    learned = experiment.fit_learned(pairs, 30.0, cause, annotators=False)
    pooled = experiment.fit_learned(pairs, 30.0, annotators=False)
    assert reward(learned) > reward(pooled)


@pytest.mark.slow
def test_an_audit_finds_an_adversary():
    pairs = draw("adversary", 2000, 3)
    keep = experiment.kept_by_audit(pairs)
    assert keep[pairs.annotator == 0].mean() > 0.9
    assert keep[pairs.annotator == 1].mean() < 0.6


def test_cells_on_disk_are_reused_unless_the_protocol_changes(tmp_path, monkeypatch):
    found = [{"reward": 1.0}]
    monkeypatch.setattr(experiment, "cell", lambda *_: found)
    stored = lambda: experiment.stored(tmp_path, experiment.CLEAN, "no noise", 64)
    assert stored() == found
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["records"] == found
    monkeypatch.setattr(experiment, "cell", lambda *_: [{"reward": 2.0}])
    assert stored() == found
    monkeypatch.setattr(experiment, "REPORTED", (0, 1))
    assert stored() == [{"reward": 2.0}]
