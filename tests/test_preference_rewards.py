"""Rewards of answers from a general preference model, which scores pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.evaluate.heads import Answers
from jaxpref.models import RewardModel
from jaxpref.models.folder import save
from jaxpref.models.reward_head import Head
from jaxpref.rewards import ModelOptions, PreferenceReward
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.choice import reward_of
from jaxpref.rewards.models import score
from jaxpref.rewards.preference import mean_scores
from tests.tiny import make_tokenizer, tiny_config, tiny_params

HEAD = Head(embedding=4, temperature=0.5)


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> PreferenceReward:
    folder = tmp_path_factory.mktemp("general")
    make_tokenizer(folder)
    model = RewardModel(tiny_config(), head=HEAD)
    save(folder, model, tiny_params(model))
    return reward_of(str(folder), ModelOptions())


def answered(*texts: str) -> Answered:
    return Answered(Example("the film", texts), {}, "file row 1")


def test_a_cycle_has_equal_rewards_and_a_missing_answer_none():
    """Three answers that beat each other in a cycle, at 120 degrees in one plane."""
    angles = np.array([0, 2, 4]) * np.pi / 3
    cycle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(mean_scores(cycle), 0, atol=1e-6)
    rng = np.random.default_rng(0)
    v = rng.normal(size=(4, 6))
    v[2] = np.nan
    found = mean_scores(v)
    for i in (0, 1, 3):
        scores = [
            sum(v[i, p] * v[j, p + 1] - v[i, p + 1] * v[j, p] for p in (0, 2, 4))
            for j in (0, 1, 3)
        ]
        np.testing.assert_allclose(found[i], sum(scores) / 3, rtol=1e-5)
    assert np.isnan(found[2])
    # Minus the mean of the others, it is the mean score over the others.
    others = losses.leave_one_out(jnp.asarray(found[[0, 1, 3]]))
    np.testing.assert_allclose(others, found[[0, 1, 3]] * 3 / 2, rtol=1e-5)


def test_two_answers_differ_by_the_score_of_the_pair(reward):
    """As `jaxpref evaluate` scores it, and loaded as not loaded."""
    pair = answered(" was good", " was bad")
    (found,) = reward([pair])
    asked = reward.weights, "embeddings", [pair], reward.options, "test"
    expected, _ = Answers(HEAD)(np.stack(score(*asked)).astype(np.float32))
    np.testing.assert_allclose(found, expected[0], rtol=1e-5)
    assert found[0] != 0 and found[0] == -found[1]
    (again,) = reward.loaded()([pair])
    np.testing.assert_allclose(again, found, rtol=1e-5)
    with pytest.raises(InputError, match="row 1: has one answer, but --reward .*two"):
        reward([answered(" was good")])
