"""The experiment with kinds of records: records, their information, and runs."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from experiments import leaderboard_world as worlds
from experiments import log_linear, record_kinds
from experiments import record_kinds_world as kinds

WORLD = worlds.make_world(12)
REWARDS = WORLD.rewards.ravel()
GROUPS = kinds.draw_groups(WORLD, 20_000, seed=7)


def test_groups_are_different_answers_to_one_prompt():
    assert GROUPS.shape == (20_000, 4)
    assert (GROUPS // 12 == GROUPS[:, :1] // 12).all()
    ordered = np.sort(GROUPS, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    counts = np.bincount(GROUPS.ravel(), minlength=len(REWARDS))
    np.testing.assert_allclose(counts, counts.mean(), rtol=0.3)


def flipped(logits):
    """The probability of a label that is flipped in 40% of the cases."""
    return 0.6 * expit(logits) + 0.4 * expit(-logits)


def test_labels_have_the_rates_that_are_stated():
    for make, answers in ((kinds.make_pairs, 2), (kinds.make_thumbs, 1)):
        records = make(WORLD, GROUPS, seed=3)
        found = records["answers"]
        if answers == 2:
            first = found[:, 0] == GROUPS.reshape(-1, 2)[:, 0]
            gaps = REWARDS[GROUPS.reshape(-1, 2)]
            p = flipped(2 * (gaps[:, 0] - gaps[:, 1]))
        else:
            first = records["desirable"] > 0.5
            assert (found[:, 0] == GROUPS.ravel()).all()
            assert (found[:, 0] // 12 != found[:, 1] // 12).all()
            p = flipped(2 * (REWARDS[found[:, 0]] - REWARDS.mean()))
        for low in np.arange(0.4, 0.6, 0.05):
            own = (low <= p) & (p < low + 0.05)
            error = 0.5 / np.sqrt(own.sum())
            assert abs(first[own].mean() - p[own].mean()) < 4 * error


def rankings(group, sharpness):
    """Every ranking of a group, and its log-probability by the Plackett-Luce model."""
    for order in itertools.permutations(group):
        u = sharpness * REWARDS[list(order)]
        yield list(order), sum(u[i] - logsumexp(u[i:]) for i in range(len(u)))


def test_rankings_follow_the_plackett_luce_model():
    group, sharpness = GROUPS[0], 0.8
    lists = kinds.make_lists(
        WORLD, np.tile(group, (20_000, 1)), sharpness=sharpness, seed=1
    )
    for order, logp in rankings(group, sharpness):
        share = (lists["answers"] == order).all(axis=1).mean()
        assert share == pytest.approx(np.exp(logp), abs=4 * 0.5 / np.sqrt(20_000))
    assert lists["ranks"][0].tolist() == [1, 2, 3, 4]
    assert lists["qualities"][0] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    one = {"answers": np.array([[5, 3, 8, 1]])}
    pairs = kinds.all_pairs(one)["answers"].tolist()
    assert pairs == [[5, 3], [5, 8], [5, 1], [3, 8], [3, 1], [8, 1]]


def test_the_information_of_a_label_is_the_variance_of_its_score():
    x, h = np.linspace(-4, 4, 9), 1e-5
    score = lambda p: (np.log(p(x + h)) - np.log(p(x - h))) / (2 * h)
    other = lambda x: 1 - flipped(x)
    expected = flipped(x) * score(flipped) ** 2 + other(x) * score(other) ** 2
    np.testing.assert_allclose(kinds.label_information(x), expected, rtol=1e-6)


def test_the_information_of_a_ranking_is_the_variance_of_its_score():
    """By all rankings of one group, with the gradient of each log-probability."""
    group, sharpness = GROUPS[1], 0.8
    features = WORLD.features[group]
    place = {answer: n for n, answer in enumerate(group)}
    expected = np.zeros((features.shape[1],) * 2)
    for order, logp in rankings(group, sharpness):
        f = sharpness * features[[place[answer] for answer in order]]
        u = sharpness * REWARDS[order]
        gradient = np.zeros(features.shape[1])
        for i in range(len(order)):
            p = np.exp(u[i:] - logsumexp(u[i:]))
            gradient += f[i] - p @ f[i:]
        expected += np.exp(logp) * np.outer(gradient, gradient)
    many = np.tile(group, (20_000, 1))
    found = kinds.of_lists(WORLD, many, sharpness)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_a_list_has_the_information_of_two_pairs():
    bounds = kinds.measure_bounds(worlds.make_world(64), groups=1000)
    assert bounds.list == pytest.approx(bounds.pair / 2, rel=0.01)
    assert 0 < bounds.sharpness < 2 and bounds.thumbs_per_pair > 1


def test_a_policy_is_rescaled_to_a_kl():
    theta = np.random.default_rng(0).normal(size=WORLD.features.shape[1])
    measured = lambda c: log_linear.measure(WORLD, jax.numpy.array(c * theta))
    scale = brentq(lambda c: float(measured(c)["kl"]) - 0.64, 0.01, 20)
    found = log_linear.reward_at_kl(WORLD, jax.numpy.array(theta), 0.64)
    assert found == pytest.approx(float(measured(scale)["reward"]), abs=1e-4)


def test_answers_are_scored_given_the_prompt_of_the_first():
    features = record_kinds.features_by_aspect(12)
    prompts = np.arange(len(REWARDS)) // 12
    own = features[prompts % len(features), np.arange(len(REWARDS))]
    np.testing.assert_allclose(own, WORLD.features)
    theta = np.random.default_rng(1).normal(size=own.shape[1])
    answers = np.array([[3, 200], [150, 7]])
    batch = record_kinds.make_batch({"answers": answers, "desirable": np.ones(2)}, 0)
    micro = dataclasses.replace(batch, tokens=batch.tokens[0])
    scored = record_kinds.score(WORLD, features, jax.numpy.array(theta), micro)
    for row, (first, other) in enumerate(answers):
        prompt = first // 12
        normalizer = logsumexp(WORLD.features[12 * prompt : 12 * prompt + 12] @ theta)
        for side, answer in enumerate((first, other)):
            logit = features[prompt % len(features), answer] @ theta
            found = scored.scores["policy_logps"][row, 0, side]
            assert found == pytest.approx(logit - normalizer, rel=1e-4)
    assert batch.numbers["desirable"].shape == (1, 2, 1)


@pytest.mark.slow
def test_the_experiment_from_command_to_report(tmp_path):
    options = record_kinds.Options(out=str(tmp_path / "out"), smoke=True)
    record_kinds.main(options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [(arm.name, arm.kind) for arm in record_kinds.ARMS]
    assert [tuple(row[:2]) for row in results["rows"]] == names
    for name in ("frontier.png", "report.html", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 200
    # Repeating the command trains nothing.
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    record_kinds.main(options)
    assert times == {path: path.stat().st_mtime_ns for path in times}
