"""The real votes, the mixed model against dense oracles, and the experiment."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from experiments import annotators, ranks, strengths, ukp
from experiments.annotators import Protocol, Votes
from jaxpref.errors import InputError

TOPICS, SIZE, WIDTH = 3, 5, 2


@pytest.fixture(scope="module")
def world(shared):
    return ukp.read(shared / "data" / "ukpconvarg1_votes.jsonl.gz")


@pytest.fixture
def small():
    """Features [T, S, D] and 40 pairs with soft labels and weights."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(TOPICS, SIZE, WIDTH))
    first = rng.integers(0, SIZE, 40)
    second = (first + rng.integers(1, SIZE, 40)) % SIZE
    at = rng.integers(0, TOPICS, 40), first, second
    return features, at, rng.random(40), rng.random(40) + 0.2


def design(features, at):
    """Dense form: margins are design @ [w, u]."""
    topic, first, second = at
    rows = []
    for t, i, j in zip(topic, first, second):
        u = np.zeros((TOPICS, SIZE))
        u[t, i], u[t, j] = 1, -1
        rows.append([*(features[t, i] - features[t, j]), *u.ravel()])
    return np.array(rows)


def dense_mode(features, at, soft, weights, spread):
    x = design(features, at)
    precision = np.r_[np.ones(WIDTH), np.full(TOPICS * SIZE, 1 / spread)]

    def negative(theta):
        m = x @ theta
        fits = soft * np.logaddexp(0, -m) + (1 - soft) * np.logaddexp(0, m)
        return weights @ fits + precision @ theta**2 / 2

    found = optimize.minimize(negative, np.zeros(len(precision)), tol=1e-12)
    return x, precision, found.x


def test_counts_of_votes(world):
    assert len(world.gold) == 12_935 and len(world.texts) == 24
    assert (len(world.pairs), world.ties) == (49_498, 15_038)
    assert sum(map(len, world.texts)) == 797 and len(set(world.names)) > 3600
    assert [(world.gold == g).sum() for g in (1, -1, 0)] == [4818, 4842, 3275]
    assert len(np.unique(world.topics[world.held_back])) == 6
    right = (world.signs == world.gold[world.pairs])[world.gold[world.pairs] != 0]
    assert right.mean() == pytest.approx(0.8506, abs=1e-4)


def test_draws_are_seeded_with_a_maximum_per_pair(world):
    one, two = (ukp.draw(world, n, seed=0) for n in (1, 2))
    assert (one == ukp.draw(world, 1, seed=0)).all()
    assert (one <= two).all() and (one != ukp.draw(world, 1, seed=1)).any()
    assert np.bincount(world.pairs[two]).max() == 2
    assert (np.bincount(world.pairs[one], minlength=12_935) == 1).sum() == len(
        np.unique(world.pairs)
    )
    assert ukp.draw(world, 5, seed=0).all()


def test_features_depend_on_the_text_and_padding_is_zero(world):
    few = dataclasses.replace(
        world, texts=[["a short one", "Why? Because it is LONGER, I think!"], ["x"]]
    )
    features = ukp.text_features(few, dimensions=3)
    assert features.shape == (2, 2, 3) and np.isfinite(features).all()
    assert not features[1, 1].any() and features[0].any(axis=1).all()
    lengths = ukp.length_features(few)
    assert (lengths[0, 1] > lengths[0, 0]).all()


def test_strengths_are_the_posterior_mode(small):
    features, at, soft, weights = small
    *_, theta = dense_mode(*small, spread=0.7)
    x = strengths.fit(
        features, at, soft, weights, spread=0.7, start=strengths.zeros(features)
    )
    np.testing.assert_allclose(np.r_[x.w, x.u.ravel()], theta, atol=2e-3)
    # Without individual effects it is ridge regression on the text.
    alone = strengths.fit(
        features,
        at,
        soft,
        weights,
        spread=strengths.ALONE,
        start=strengths.zeros(features),
    )
    assert np.abs(alone.u).max() < 1e-4


def test_variances_are_those_of_laplace(small):
    features, at, _, precision = small
    x, prior = design(features, at), np.r_[np.ones(WIDTH), np.full(15, 1 / 0.7)]
    covariance = np.linalg.inv(x.T @ (precision[:, None] * x) + np.diag(prior))
    expected = np.einsum("pa,ab,pb->p", x, covariance, x)
    found = strengths.variances(features, at, precision, spread=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_cavity_excludes_the_pairs_own_votes():
    """The cavity is close to a fit without the pair, and far from one with it."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(TOPICS, SIZE, WIDTH))
    places = [(t, i, j) for t in range(TOPICS) for i in range(SIZE) for j in range(i)]
    at = tuple(np.array(places).T)
    evidence = rng.choice([-2.2, 2.2], len(places))
    everyone = np.ones(len(places), bool)

    def mode(left_out=None):
        """EM to the mode of the marginal likelihood of the votes."""
        weights = everyone.astype(float)
        if left_out is not None:
            weights[left_out] = 0
        x = strengths.zeros(features)
        for _ in range(60):
            believed = strengths.margins(x, features, at) + evidence
            soft = 1 / (1 + np.exp(-believed))
            x = strengths.fit(features, at, soft, weights, spread=0.7, start=x)
        return strengths.margins(x, features, at)

    margin = mode()
    outside = strengths.cavity(features, at, margin, evidence, everyone, spread=0.7)
    left_out = np.array([mode(n)[n] for n in range(len(places))])
    inside_error = np.abs(margin - left_out).mean()
    # A mode does not include shrinkage by uncertainty: compare directions and trend.
    assert np.corrcoef(outside, left_out)[0, 1] > 0.97
    assert np.abs(outside - left_out).mean() < inside_error / 2
    # The pair's own votes shift the mode but not the cavity.
    assert np.mean(np.sign(evidence) * (margin - left_out)) > 0.2


def test_ranks_and_areas():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50), rng.normal(size=50)
    assert ranks.rank_correlation(a, b) == pytest.approx(
        stats.spearmanr(a, b).statistic
    )
    assert np.isnan(ranks.rank_correlation(np.ones(50), b))
    positive = b + a > 3
    wins = [(x > y) + (x == y) / 2 for x in a[positive] for y in a[~positive]]
    assert ranks.area(a, positive) == pytest.approx(np.mean(wins))


def simulated(seed=0):
    """One vote per pair, strengths partly in the text, unreliable workers."""
    rng = np.random.default_rng(seed)
    topics, size, workers = 8, 14, 30
    features = rng.normal(size=(topics, size, 3))
    strength = features @ [1.5, -1.0, 0.5] + rng.normal(size=(topics, size))
    places = [(t, i, j) for t in range(topics) for i in range(size) for j in range(i)]
    at = tuple(np.array(places).T)
    topic, first, second = at
    margin = 2 * (strength[topic, first] - strength[topic, second])
    truth = np.where(rng.random(len(places)) < 1 / (1 + np.exp(-margin)), 1, -1)
    eta = np.where(np.arange(workers) % 5, 0.92, 0.4)
    worker = rng.integers(0, workers, len(places))
    sign = np.where(rng.random(len(places)) < eta[worker], truth, -truth)
    index = np.arange(len(places))
    return features, Votes(at, index, index, worker, sign), truth, eta


def test_the_joint_model_finds_unreliable_workers_and_wrong_votes():
    features, seen, truth, eta = simulated()
    protocol = Protocol(scale=1.0, spread=1.0)
    _, fit, _ = annotators.learn_jointly(seen, features, len(eta), protocol, 1.0)
    learned = np.asarray(fit.reliability)
    assert ranks.area(learned, eta > 0.5) > 0.95
    wrong = seen.sign != truth
    doubt = lambda fit: -annotators.pair_logits(seen, fit) * seen.sign
    blind = annotators.reliabilities(
        seen, np.zeros(len(truth)), len(eta), protocol.prior
    )
    assert ranks.area(doubt(fit), wrong) > 0.85
    assert ranks.area(doubt(blind), wrong) == pytest.approx(0.5)


def test_held_out_topics_do_not_affect_the_model():
    features, seen, truth, eta = simulated()
    protocol = Protocol(scale=1.0, spread=1.0, rounds=3)
    trains = seen.at[0] % 2 == 0
    other = dataclasses.replace(seen, sign=np.where(trains, seen.sign, -seen.sign))
    first, second = (
        annotators.learn_jointly(votes, features, len(eta), protocol, 1.0, trains)
        for votes in (seen, other)
    )
    assert (first[0].w == second[0].w).all()
    assert (np.asarray(first[1].reliability) == second[1].reliability).all()
    labels = (1 + seen.sign) / 2
    ones = np.ones(len(labels))
    flipped = np.where(seen.at[0] % protocol.folds == 0, 1 - labels, labels)
    before, after = (
        annotators.learn_from(seen, features, soft, ones, protocol)
        for soft in (labels, flipped)
    )
    held = seen.at[0] % protocol.folds == 0
    assert (before[held] == after[held]).all() and (before != after)[~held].any()


def test_a_missing_file_is_reported(tmp_path):
    path = tmp_path / "votes.jsonl.gz"
    path.write_text("no gzip")
    for data in (path, tmp_path / "none.gz"):
        options = annotators.Options(data=str(data), out=str(tmp_path / "out"))
        with pytest.raises(InputError, match="cannot be read.*--data"):
            annotators.main(options)


@pytest.mark.slow
def test_the_whole_experiment(shared, tmp_path):
    script = Path(__file__).resolve().parents[1] / "experiments" / "annotators.py"
    data = shared / "data" / "ukpconvarg1_votes.jsonl.gz"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--out", tmp_path, "--data", data],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "results.json").read_text())
    joint = {r["votes"]: r for r in made["runs"] if r["arm"] == "EM, jointly"}
    blind = {r["votes"]: r for r in made["runs"] if r["arm"].startswith("Dawid")}
    assert joint[1]["auroc"] > 0.85 and blind[1]["auroc"] == 0.5
    assert joint[2]["auroc"] > blind[2]["auroc"]
    assert joint[2]["spearman"] > blind[2]["spearman"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and 'src="http' not in page
