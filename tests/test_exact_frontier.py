"""The log-linear experiment: its features, its minimizer, and its exact sums."""

import functools

import numpy as np
import pytest

from experiments import exact_frontier as exact
from experiments import sentiment_world as world
from jaxpref import losses


def test_a_review_says_its_clauses_with_the_weights_of_the_gold_reward():
    prompt = "cafe , mostly beer :"
    review = "although the beer was not very cold , the room was good ."
    (beer, beer_share), (room, room_share) = exact.phrases(prompt, review)
    assert (beer, room) == ("True not very cold", "good")
    # "although" halves the first clause, and the prompt doubles it.
    assert (beer_share, room_share) == pytest.approx((0.5, 0.5))
    said = exact.phrases(prompt, "the room was good . we hated it .")
    assert said == [("good", 0.5), ("we hated it .", 0.5)]


def test_the_gold_reward_is_linear_in_the_features():
    made = exact.make_world(60)
    features = made.features.reshape(-1, made.features.shape[-1])
    found, *_ = np.linalg.lstsq(features, made.rewards.ravel(), rcond=None)
    np.testing.assert_allclose(features @ found, made.rewards.ravel(), atol=1e-10)


def test_pairs_are_labeled_by_the_gold_reward():
    made = exact.make_world(40)
    # With features that are the reward, chosen minus rejected is mostly positive.
    made = exact.World(made.rewards[..., None], made.rewards)
    clean, signs = exact.draw_pairs(made, 4000, seed=3)
    right = 1 / (1 + np.exp(-world.SHARPNESS * np.abs(clean[:, 0])))
    hits = (clean[:, 0] > 0)[clean[:, 0] != 0]
    assert abs(hits.mean() - right[clean[:, 0] != 0].mean()) < 0.03
    assert abs(np.mean(signs < 0) - exact.FLIP_RATE) < 0.03


def test_the_fit_is_the_minimum_of_a_one_dimensional_problem():
    # 3 of 4 labels agree with the feature: DPO's margin is log 3, without a ridge.
    differences = np.array([[1.0], [1.0], [1.0], [-1.0]])
    made = exact.make_derivatives(functools.partial(losses.dpo, beta=1.0))
    assert exact.fit(made, differences, 0.0)[0] == pytest.approx(np.log(3), abs=1e-3)
    # With one, its gradient vanishes: theta ridge = 3/4 - s(theta).
    theta = exact.fit(made, differences, 0.1)[0]
    assert theta * 0.1 == pytest.approx(0.75 - 1 / (1 + np.exp(-theta)), abs=1e-4)


def test_rewards_and_kls_are_exact():
    made = exact.World(np.array([[[0.0], [1.0]]]), np.array([[0.0, 1.0]]))
    point = exact.measure(made, np.array([2.0]))
    p = 1 / (1 + np.exp(-2.0))
    kl = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    assert (point["reward"], point["kl"]) == pytest.approx((p, kl))
    # The same policy, from another scale.
    assert exact.reward_at(made, np.array([7.0]), kl) == pytest.approx(p, abs=1e-3)
