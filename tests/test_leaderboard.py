"""The table of all methods: its policies, its training runs, and what it lists."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import leaderboard, leaderboard_report
from experiments import leaderboard_methods as methods
from experiments import leaderboard_world as worlds
from jaxpref.cli.objectives import LOSSES, MIXTURES, WRAPPERS

ROOT = Path(__file__).resolve().parents[1]
WORLD = worlds.make_world(12)
LARGER = worlds.make_world(40)
TABLE = methods.all_methods()
SIZES = methods.Sizes(pairs=96, batch=16)
NOISE = worlds.NOISES["symmetric 20%"]


def test_every_trainable_loss_and_objective_is_in_the_table_or_has_a_reason():
    page = (ROOT / "docs" / "losses.md").read_text("utf-8")
    tables = [x for x in page.split("\n## ") if x.startswith("Pairwise losses for")]
    pairwise = re.findall(r"^\| \[`(\w+)`\]", "\n".join(tables), re.MULTILINE)
    assert "dove" in pairwise and "bradley_terry" in pairwise
    public = {*LOSSES, *WRAPPERS, *MIXTURES, *pairwise}
    assert public | {"known_rates"} == TABLE.keys() | methods.EXCEPTIONS.keys()
    assert not TABLE.keys() & methods.EXCEPTIONS.keys()
    assert TABLE.keys() >= {*methods.FULL, *leaderboard_report.DRAWN}
    knows = {name for name, method in TABLE.items() if method.needs_rate}
    assert knows == {"cdpo", "rdpo", "forward_dpo", "crm"}
    assert TABLE["known_rates"].knows == "the flip rate of each pair"
    assert TABLE["reward_regression"].knows == "the gold rewards"
    assert not TABLE["dpo"].knows and not TABLE["instance_noise"].knows


def test_only_losses_of_margins_do_without_the_normalizer():
    names = ("dpo", "r_dpo", "simpo", "dpop", "sft")
    assert [n for n in names if TABLE[n].reads_margins] == ["dpo", "r_dpo"]


def brute_force(world, theta, answer):
    """(log-prob of each token, KL of each position, log sum of squares), in float64.

    From the next-token distributions, each computed by going through all answers.
    """
    reviews = world.rewards.shape[1]
    prompt = answer // reviews
    mine = np.arange(prompt * reviews, (prompt + 1) * reviews)
    weights = np.exp(world.features[mine] @ theta)
    p, q = weights / weights.sum(), np.full(reviews, 1 / reviews)
    path, found = world.paths[answer], []
    for t in range(world.lengths[answer]):
        same = (world.paths[mine][:, :t] == path[:t]).all(axis=1)
        following = world.paths[mine, t]
        of = lambda w, node, same=same, next_=following: w[same & (next_ == node)].sum()
        total = [weights[same].sum() for weights in (p, q)]
        nodes = set(following[same].tolist())
        next_p = {node: of(p, node) / total[0] for node in nodes}
        next_q = {node: of(q, node) / total[1] for node in nodes}
        kl = sum(next_q[n] * np.log(next_q[n] / next_p[n]) for n in nodes)
        squares = np.log(sum(value**2 for value in next_p.values()))
        found.append((np.log(next_p[path[t]]), kl, squares))
    return np.array(found).T


def test_scores_of_tokens_are_those_of_the_tree_of_prefixes():
    theta = np.random.default_rng(0).normal(size=WORLD.features.shape[1])
    answers = np.array([[0, 5], [30, 26], [270, 280]])
    pairs = worlds.Pairs(answers, np.zeros(3, bool), np.full(3, -1), {})
    batch = methods.make_batch(WORLD, vars(pairs), 0)
    micro = dataclasses.replace(
        batch,
        tokens=batch.tokens[0],
        completion_lengths=batch.completion_lengths[0],
    )
    reads = frozenset({"policy_logps", "policy_prefix_logps", "kls", "log_weights"})
    of_theta = functools.partial(methods.score, world=WORLD, reads=reads)
    found = jax.jit(of_theta)(jnp.array(theta, jnp.float32), micro)
    for row, pair in enumerate(answers):
        shorter = WORLD.lengths[pair].min()
        for side, answer in enumerate(pair):
            logps, kls, squares = brute_force(WORLD, theta, answer)
            expected = {
                "policy_logps": logps.sum(),
                "policy_prefix_logps": logps[:shorter].sum(),
                "kls": kls.sum(),
                "log_weights": (logps - squares).mean(),
                "reference_logps": -np.log(12),
            }
            for name, value in expected.items():
                at = found[name][row, 0, side]
                assert at == pytest.approx(value, rel=1e-4, abs=1e-5), name


def numpy_dpo(world, pairs, beta, learning_rate, sizes):
    """DPO by Adam with clipping and a cosine schedule, in float64: (reward, KL)."""
    theta = np.zeros(world.features.shape[1])
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for step in range(sizes.steps):
        rows = pairs.answers[step * sizes.batch : (step + 1) * sizes.batch]
        difference = world.features[rows[:, 0]] - world.features[rows[:, 1]]
        h = beta * difference @ theta
        gradient = -(beta / (1 + np.exp(h)))[:, None] * difference
        gradient = gradient.mean(axis=0)
        gradient /= max(1.0, np.linalg.norm(gradient))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = [
            first / (1 - 0.9 ** (step + 1)),
            second / (1 - 0.999 ** (step + 1)),
        ]
        rate = learning_rate * 0.5 * (1 + np.cos(np.pi * step / sizes.steps))
        theta -= rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    weights = np.exp(world.features @ theta).reshape(world.rewards.shape)
    p = weights / weights.sum(axis=1, keepdims=True)
    reward = (p * world.rewards).sum(axis=1).mean()
    return reward, (p * np.log(p * p.shape[1])).sum(axis=1).mean()


def test_a_run_of_dpo_is_that_of_numpy():
    draws = [worlds.draw_pairs(WORLD, NOISE, SIZES.pairs, seed=s) for s in (3, 4)]
    settings = [(0.1, 0.1), (1.0, 0.03), (4.0, 0.1)]
    # In float32, gradients that are 0 up to rounding would move Adam.
    with jax.enable_x64(True):
        train = methods.trainer(WORLD, TABLE["dpo"], NOISE)
        found = train(methods.stacked(draws, SIZES), *jnp.array(settings).T)
    assert found["reward"].shape == (2, 3)
    for n, pairs in enumerate(draws):
        for k, setting in enumerate(settings):
            reward, kl = numpy_dpo(WORLD, pairs, *setting, SIZES)
            assert found["reward"][n, k] == pytest.approx(reward, abs=1e-6)
            assert found["kl"][n, k] == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("noise", worlds.NOISES.values(), ids=lambda noise: noise.name)
def test_labels_have_the_rates_that_are_stated(noise):
    world = LARGER
    pairs = worlds.draw_pairs(world, noise, 8000, seed=2)
    clean = worlds.draw_pairs(world, worlds.NOISES["none"], 8000, seed=2)
    same = (pairs.answers == clean.answers).all(axis=1)
    np.testing.assert_array_equal(same, ~pairs.is_flipped)
    assert pairs.is_flipped.mean() == pytest.approx(noise.flip_rate, abs=0.03)
    ratings = [pairs.labels[f"{side}_rating"] for side in ("chosen", "rejected")]
    np.testing.assert_array_equal(world.rewards.ravel()[pairs.answers].T, ratings)
    rate = pairs.labels["flip_rate"]
    if noise.annotators:
        assert set(pairs.annotator) == set(range(noise.annotators))
        for pool in worlds.POOL_RATES:
            assert pairs.is_flipped[np.isclose(rate, pool)].mean() == pytest.approx(
                pool, abs=0.02
            )
    if noise.name == "half by length":
        chosen, rejected = world.lengths[pairs.answers].T
        assert (chosen[np.isclose(rate, 0.5)] >= rejected[np.isclose(rate, 0.5)]).all()
        assert not pairs.is_flipped[rate == 0].any()


BEST = [{"kl": kl, "reward": 2.0 * np.sqrt(kl)} for kl in (0.0, 0.25, 1.0, 4.0)]


def made_part(method, gain):
    """Runs of three seeds whose reward is gain sqrt(KL), at two learning rates.

    On the reported seeds, the other learning rate is far better.
    """
    betas, rates = [1.0, 0.5, 0.1] * 2, [0.1] * 3 + [0.3] * 3
    kl = np.array([[0.16, 0.9, 1.44] * 2] * 3)
    gains = np.array([[gain] * 6, [gain] * 3 + [1.9] * 3, [gain + 0.1] * 3 + [1.9] * 3])
    gains[0, 3:] = 0.1
    reward = gains * np.sqrt(kl)
    return {
        "method": method, "noise": "none", "knows": "", "seeds": [100, 0, 1],
        "betas": betas, "learning_rates": rates,
        "kl": kl.tolist(), "reward": reward.tolist(),
    }  # fmt: skip


def test_the_table_compares_at_matched_kl_and_tunes_on_other_seeds():
    part, baseline = made_part("ipo", 1.2), made_part("dpo", 1.0)
    entry = leaderboard_report.make_entry(part, baseline, [100], BEST)
    assert (entry["beta"], entry["learning_rate"]) == (0.5, 0.1)
    (_, at_one) = entry["matched"]
    assert at_one["reward"] == pytest.approx([1.2, 1.3])
    assert at_one["share"] == pytest.approx(1.25 / 2)
    assert at_one["minus_dpo"] == [pytest.approx(0.2), None, None]  # of two seeds
    assert entry["spread"][0] == pytest.approx(1.25 / 2)
    assert entry["spread"][2] == pytest.approx(1.9 / 2)
    rows = leaderboard_report.make_rows(part, [100], BEST)
    assert [row["beta"] for row in rows] == [1.0, 0.5, 0.1] * 2
    assert [row["tuned"] for row in rows] == [False, True, False] * 2
    assert rows[0]["share_of_best_possible"] == pytest.approx(0.6)


def test_what_a_frontier_does_not_reach_is_missing():
    part = made_part("ipo", 1.2)
    part["kl"][1][2] = 0.95  # seed 0 stays below KL 1
    entry = leaderboard_report.make_entry(part, made_part("dpo", 1.0), [100], BEST)
    at, at_one = entry["matched"]
    assert at["share"] is not None
    assert at_one["share"] is None and at_one["minus_dpo"] == [None] * 3
    assert leaderboard_report.marked(at_one) == "–"
    part["kl"][1][2] = None  # a run that diverged
    leaderboard_report.make_entry(part, made_part("dpo", 1.0), [100], BEST)
    rows = leaderboard_report.make_rows(part, [100], BEST)
    assert rows[2]["kl"] is None and rows[2]["share_of_best_possible"] is None


@pytest.mark.slow
def test_the_command_resumes_and_writes_rows_and_page(tmp_path):
    options = leaderboard.Options(
        out=str(tmp_path / "out"), smoke=True, methods="dpo", noises="two pools"
    )
    leaderboard.main(options)
    rows = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    fields = "method noise seed beta reward kl share_of_best_possible".split()
    assert all(set(fields) <= row.keys() for row in rows)
    assert {(row["noise"], row["seed"]) for row in rows} == {
        ("two pools", seed) for seed in (0, 1)
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "two pools" in page and "data:image/png;base64," in page
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    leaderboard.main(options)
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert len(written) == 1 and again == written
