"""Reward at matched KL and shares of the best possible, against other computations."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxpref.evaluate.frontier import (
    best_possible,
    choose_setting,
    reward_at_kl,
    share_of_best_possible,
    t_interval,
)

NAN = np.nan


# ---- the best possible -------------------------------------------------------------


def test_best_possible_of_two_answers_is_the_closed_form():
    # One prompt, two equally likely answers with rewards 0 and 1, many samples of each.
    rewards, tilts = np.tile([0.0, 1.0], (1, 500)), np.array([0.0, 0.3, 2.0])
    kls, means = best_possible(rewards, tilts)
    p = 1 / (1 + np.exp(-tilts))
    assert_allclose(means, p, rtol=1e-12)
    expected = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    assert_allclose(kls, expected, atol=1e-12)
    assert kls[0] == 0


def test_best_possible_of_normal_rewards_is_the_closed_form():
    # Tilting N(m, s^2) by exp(t r) gives N(m + t s^2, s^2), at a KL of t^2 s^2 / 2.
    draws = np.random.default_rng(0).normal(size=(2, 400_000))
    draws = (draws - draws.mean(axis=1, keepdims=True)) / draws.std(axis=1)[:, None]
    spread, middle = np.array([[0.5], [1.5]]), np.array([[-1.0], [2.0]])
    tilts = np.array([0.1, 0.5, 1.0])
    kls, means = best_possible(middle + spread * draws, tilts)
    variance = np.mean(spread**2)
    assert_allclose(means, 0.5 + tilts * variance, rtol=0.01)
    assert_allclose(kls, tilts**2 * variance / 2, rtol=0.02)


def test_no_policy_is_above_the_best_possible():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(3, 40))
    kls, means = best_possible(rewards, np.linspace(0, 0.55, 200))
    assert np.isfinite(kls).all()
    for _ in range(2000):
        # Policies near the optimum, with another tilt and some noise for each prompt.
        tilt = rng.uniform(0, 0.5) + rng.normal(0, 0.1, (3, 1))
        logits = tilt * rewards + rng.normal(0, rng.uniform(0, 0.2), rewards.shape)
        policy = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        kl = np.mean(np.sum(policy * np.log(policy * 40), axis=1))
        reward = np.mean(np.sum(policy * rewards, axis=1))
        if kl <= kls[-1]:
            assert reward <= reward_at_kl(kls, means, np.array([kl]))[0] + 1e-5


def test_best_possible_is_nan_where_few_samples_carry_the_weight():
    rewards = np.random.default_rng(2).normal(size=(2, 1000))
    kls, means = best_possible(rewards, np.array([0.5, 30.0]))
    assert_allclose(np.isnan(kls), [False, True])
    assert_allclose(np.isnan(means), [False, True])


# ---- matched KL --------------------------------------------------------------------


def test_reward_at_kl_is_linear_in_the_root_of_the_kl():
    # The order of the points does not matter, and equal KLs are averaged.
    kls, rewards = np.array([4.0, 0.0, 1.0, 1.0]), np.array([5.0, -1.0, 2.5, 3.5])
    at = np.array([0.0, 0.25, 1.0, 2.25, 4.0])
    assert_allclose(reward_at_kl(kls, rewards, at), [-1, 1, 3, 4, 5])


def test_reward_at_kl_extrapolates_nothing():
    kls, rewards = np.array([0.5, 1.0]), np.array([1.0, 2.0])
    found = reward_at_kl(kls, rewards, np.array([0.49, 0.5, 1.0, 1.01]))
    assert_allclose(found, [NAN, 1, 2, NAN])
    assert_allclose(reward_at_kl(kls[:1], rewards[:1], np.array([0.5, 0.6])), [1, NAN])


def test_share_of_best_possible_by_hand():
    best_kls, best = np.array([1.0, 0.0, 4.0, NAN]), np.array([3.0, 1.0, 5.0, NAN])
    kls, rewards = np.array([1.0, 2.25, 0.0, 4.1]), np.array([2.0, 4.0, 1.0, 5.0])
    found = share_of_best_possible(kls, rewards, best_kls, best)
    assert_allclose(found, [0.5, 1.0, NAN, NAN])


def test_points_of_the_best_possible_curve_have_a_share_of_one():
    rewards = np.random.default_rng(3).normal(size=(4, 2000))
    curve = best_possible(rewards, np.linspace(0, 1, 40))
    between = best_possible(rewards, np.linspace(0.1, 1, 17))
    assert_allclose(share_of_best_possible(*between, *curve), 1, atol=1e-3)


# ---- intervals and tuning ----------------------------------------------------------


@pytest.mark.parametrize("draws", [2, 3, 4, 5, 10, 31])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_t_interval_is_scipys(draws, confidence):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(draws).normal(3.0, 2.0, draws)
    mean, low, high = t_interval(values, confidence=confidence)
    expected = stats.t.interval(
        confidence, draws - 1, loc=values.mean(), scale=stats.sem(values)
    )
    assert mean == pytest.approx(values.mean())
    assert_allclose([low, high], expected, rtol=1e-10)


def test_t_interval_covers_and_pairs():
    rng = np.random.default_rng(0)
    # Two methods share a draw's noise; only the interval of the differences is narrow.
    shared = rng.normal(0, 5, (4000, 5))
    differences = (shared + 1 + rng.normal(0, 0.1, shared.shape)) - shared
    intervals = np.array([t_interval(row) for row in differences])
    covered = np.mean((intervals[:, 1] <= 1) & (1 <= intervals[:, 2]))
    assert 0.935 < covered < 0.965
    assert np.mean(intervals[:, 2] - intervals[:, 1]) < 0.3


def test_t_interval_without_enough_draws_is_nan():
    assert_allclose(t_interval(np.array([2.0])), [2, NAN, NAN])
    assert_allclose(t_interval(np.array([2.0, NAN, 1.0])), [NAN] * 3)


def test_the_tuning_rule_takes_the_most_reward_within_the_budget():
    kls = np.array([[0.2, 0.5, 0.9, 0.7], [0.4, 0.7, 1.1, 0.5]])
    rewards = np.array([[1.0, 1.4, 2.0, 1.5], [1.0, 1.6, 2.0, 1.5]])
    # Means: KL .3, .6, 1.0, .6 and reward 1, 1.5, 2, 1.5.
    assert choose_setting(kls, rewards, most_kl=0.65) in (1, 3)
    assert choose_setting(kls, rewards, most_kl=0.35) == 0
    assert choose_setting(kls, rewards, most_kl=1.2) == 2
    kls[:, 3] -= 0.1  # of two with equal reward, the one closer to the reference
    assert choose_setting(kls, rewards, most_kl=0.65) == 3
    with pytest.raises(ValueError, match="the smallest is 0.3"):
        choose_setting(kls, rewards, most_kl=0.2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reward_at_kl(np.ones(2), np.ones(3), np.ones(1)), "equal shapes"),
        (lambda: reward_at_kl(-np.ones(1), np.ones(1), np.ones(1)), "KLs >= 0"),
        (lambda: reward_at_kl(np.ones(1), np.ones(1), -np.ones(1)), "KLs >= 0"),
        (lambda: reward_at_kl(np.array([NAN]), np.ones(1), np.ones(1)), "finite kls"),
        (lambda: reward_at_kl(np.ones(0), np.ones(0), np.ones(1)), "at least one"),
        (lambda: best_possible(np.ones((2, 9)), -np.ones(1)), "tilts >= 0"),
        (lambda: best_possible(np.ones(9), np.ones(1)), "2 axes"),
        (lambda: share_of_best_possible(*np.ones((4, 2))), "from KL 0"),
        (lambda: t_interval(np.ones(0)), "one value per draw"),
        (lambda: t_interval(np.ones(3), confidence=1.0), "confidence in"),
        (
            lambda: choose_setting(np.ones((1, 2)), np.ones((1, 3)), most_kl=1.0),
            "equal",
        ),
    ],
)
def test_wrong_arguments_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
