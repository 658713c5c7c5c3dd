"""Selection over samples and aligned decoding, in a world that can be enumerated.

Answers have at most three tokens out of three, and token 0 ends them.
"""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.special

from experiments import more_samples
from jaxpref.sampling.choice import (
    best_of_majority,
    best_of_n,
    majority_vote,
    minimum_bayes_risk,
    pessimistic_best_of_n,
)
from jaxpref.sampling.directions import neighboring_directions
from jaxpref.sampling.qalign import acceptance, qalign
from jaxpref.sampling.transfer_q import tilted, transfer_q

VOCABULARY, LONGEST = 3, 3
RNG = np.random.default_rng(3)
PREFIXES = [
    prefix
    for n in range(LONGEST)
    for prefix in itertools.product(range(1, VOCABULARY), repeat=n)
]
NEXT = {prefix: RNG.dirichlet(np.full(VOCABULARY, 1.5)) for prefix in PREFIXES}
"""The model: the distribution of the next token after each prefix."""


def is_whole(text) -> bool:
    return len(text) == LONGEST or 0 in text


ANSWERS = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(VOCABULARY)
    if is_whole((*prefix, token))
]
P = np.array([math.prod(NEXT[a[:n]][a[n]] for n in range(len(a))) for a in ANSWERS])
REWARDS = dict(zip(ANSWERS, RNG.normal(size=len(ANSWERS))))
R = np.array([REWARDS[a] for a in ANSWERS])


def complete(prefix, rng):
    """The model's continuation."""
    while not (prefix and is_whole(prefix)):
        prefix = (*prefix, int(rng.choice(VOCABULARY, p=NEXT[tuple(prefix)])))
    return prefix


def shares(found) -> np.ndarray:
    return np.array([sum(x == a for x in found) for a in ANSWERS]) / len(found)


def total_variation(p, q) -> float:
    return float(np.abs(p - q).sum() / 2)


def noise(p, count) -> float:
    """A bound of the total variation of `count` draws from p, by Cauchy-Schwarz, plus
    four standard deviations (McDiarmid)."""
    return 0.5 * math.sqrt(len(p) / count) + 4 * math.sqrt(0.25 / count)


def test_the_world_is_a_distribution():
    assert len(ANSWERS) == 15 and P.sum() == pytest.approx(1)


CHAINS, BETA = 1500, 0.8
TARGET = scipy.special.softmax(np.log(P) + R / BETA)


def test_qalign_converges_to_the_tilted_distribution():
    rng = np.random.default_rng(0)
    start = [complete((), rng) for _ in range(CHAINS)]

    def propose(step, texts, kept):
        return [complete(text[:n], rng) for text, n in zip(texts, kept, strict=True)]

    reward = lambda texts: np.array([REWARDS[text] for text in texts])
    states = qalign(start, propose, reward, steps=20, beta=BETA, seed=1)
    distances = [total_variation(shares(x), TARGET) for x in states]
    assert distances[0] == pytest.approx(
        total_variation(P, TARGET), abs=noise(P, CHAINS)
    )
    assert distances[0] > distances[1] > distances[2] > distances[5]
    assert distances[20] < noise(TARGET, CHAINS) < distances[0] / 2
    # Without the lengths, the chains would converge to another distribution.
    lengths = np.array([len(a) for a in ANSWERS])
    biased = scipy.special.softmax(np.log(P * lengths) + R / BETA)
    assert total_variation(biased, TARGET) > noise(TARGET, CHAINS)


def test_the_step_of_qalign_leaves_the_target_unchanged():
    """The transition matrix of one step, by enumeration."""
    step = np.zeros((len(ANSWERS),) * 2)
    for i, old in enumerate(ANSWERS):
        for kept in range(len(old)):
            for j, new in enumerate(ANSWERS):
                if new[:kept] != old[:kept] or len(new) <= kept:
                    continue
                q = math.prod(NEXT[new[:n]][new[n]] for n in range(kept, len(new)))
                sizes = np.array([len(old)]), np.array([len(new)])
                accepted = acceptance(R[[i]], R[[j]], *sizes, beta=BETA)
                step[i, j] += q * accepted[0] / len(old)
    step[np.diag_indices(len(ANSWERS))] += 1 - step.sum(axis=1)
    np.testing.assert_allclose(TARGET @ step, TARGET, atol=1e-12)


def test_a_chain_depends_on_its_own_numbers_alone():
    def propose(step, texts, kept):
        return [
            complete(text[:n], np.random.default_rng([step, *text]))
            for text, n in zip(texts, kept, strict=True)
        ]

    reward = lambda texts: np.array([REWARDS[text] for text in texts])
    start = [ANSWERS[n] for n in (3, 8, 11)]
    options = dict(steps=6, beta=1.0, seed=2)
    ids = [(4, 0), (4, 1), (9, 0)]
    together = qalign(start, propose, reward, **options, ids=ids)
    for n in range(3):
        alone = qalign(start[n : n + 1], propose, reward, **options, ids=ids[n : n + 1])
        assert [x[0] for x in alone] == [x[n] for x in together]


def test_answers_without_a_reward_are_left():
    one, nan = np.ones(1), np.full(1, np.nan)
    assert acceptance(one, nan, one, one, beta=1.0) == 0
    assert acceptance(nan, one, one, one, beta=1.0) == 1


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_best_of_n_is_the_largest_of_n_draws(n):
    """P(max <= r) = F(r)^n for the distribution F of the reward."""
    order = np.argsort(R)
    cumulative = np.cumsum(P[order]) ** n
    expected = np.zeros(len(R))
    expected[order] = np.diff(cumulative, prepend=0)
    rng, draws = np.random.default_rng(0), 4000
    drawn = rng.choice(len(R), size=(draws, n), p=P)
    found = np.array([row[best_of_n(R[row])] for row in drawn])
    share = np.bincount(found, minlength=len(R)) / draws
    assert total_variation(share, expected) < noise(expected, draws)
    kl = np.sum(scipy.special.rel_entr(expected, P))
    assert kl <= math.log(n) - (n - 1) / n + 1e-12


def test_rewards_that_are_missing_or_uncertain():
    assert best_of_n(np.array([np.nan, -3.0, -1.0, -1.0])) == 2
    assert best_of_n(np.array([np.nan, np.nan])) == 0
    rewards, stds = np.array([1.0, 1.5, 0.0]), np.array([0.1, 2.0, 0.0])
    found = [
        pessimistic_best_of_n(rewards, stds, penalty=penalty) for penalty in (0, 1, 20)
    ]
    assert found == [1, 0, 2]


def test_votes():
    assert majority_vote(["7", "8", None, "8", "7", None, None]) == 0
    assert majority_vote(["1", "8", "8"]) == 1
    assert majority_vote([None, None]) == 0
    utilities = [[1, 0.8, 0.1], [0.8, 1, 0.5], [0.1, 0.5, 1]]
    assert minimum_bayes_risk(np.array(utilities)) == 1
    utilities[1][0] = np.nan
    assert minimum_bayes_risk(np.array(utilities)) == 0


def test_the_best_of_the_majority():
    answers = ["a", "b", "a", "b", "c", "d", None, "b"]
    rewards = np.array([1.0, 0.2, 3.0, 0.4, 9.0, np.nan, 50.0, 0.6])
    pick = lambda **options: best_of_majority(answers, rewards, **options)
    assert pick(min_frequency=0.25) == [2]  # a has 1/4 and a mean of 2
    assert pick(min_frequency=0.25, k=3) == [2, 7]
    assert pick(min_frequency=0.375) == [7]
    assert pick(min_frequency=0.9) == [7]  # the most frequent
    assert pick(min_frequency=0) == [4]
    assert best_of_majority([None] * 2, rewards[:2], min_frequency=0) == [0]
    # A sample without a reward does not count against its answer.
    rewards = np.array([5.0, np.nan, 5.0, 1.0, 1.0, np.nan])
    assert best_of_majority([*"aaabbc"], rewards, min_frequency=0, k=3) == [0, 3, 5]


def test_best_of_majority_resists_a_wrong_reward():
    """The right answer has probability 0.4; the reward overrates a rare wrong one."""
    p, reward = np.array([0.3, 0.4, 0.28, 0.02]), np.array([0.0, 1.0, 0.0, 1.5])
    rng, right = np.random.default_rng(0), {}
    for n in (4, 64):
        drawn = rng.choice(4, size=(300, n), p=p)
        majority = [
            row[best_of_majority(row.tolist(), reward[row], min_frequency=0.2)[0]]
            for row in drawn
        ]
        best = [row[best_of_n(reward[row])] for row in drawn]
        right[n] = [np.mean(np.array(x) == 1) for x in (majority, best)]
    assert right[64][0] > 0.95 > right[4][0]
    # 0.98^64 = 0.27
    assert right[64][1] < 0.4 < right[4][1]


ALPHA = 0.7


def exact_value(prefix) -> float:
    """The mean reward of the model's completions."""
    if is_whole(prefix):
        return REWARDS[prefix]
    return sum(p * exact_value((*prefix, v)) for v, p in enumerate(NEXT[prefix]))


def exact_decoding() -> np.ndarray:
    """The distribution of answers of Transfer Q* with exact values."""
    found = []
    for answer in ANSWERS:
        logp = 0.0
        for n, token in enumerate(answer):
            values = [exact_value((*answer[:n], v)) for v in range(VOCABULARY)]
            z = np.log(NEXT[answer[:n]]) + np.array(values) / ALPHA
            logp += scipy.special.log_softmax(z)[token]
        found.append(math.exp(logp))
    return np.array(found)


def test_transfer_q_approaches_its_exact_distribution_with_rollouts():
    rng, count, distances = np.random.default_rng(0), 1000, {}

    def candidates(numbers, texts):
        logps = np.log([NEXT[text] for text in texts])
        order = np.argsort(-logps, axis=1)
        return order, np.take_along_axis(logps, order, axis=1)

    for rollouts in (1, 16):

        def values(step, numbers, texts, rollouts=rollouts):
            return [
                np.mean([REWARDS[complete(text, rng)] for _ in range(rollouts)])
                for text in texts
            ]

        options = dict(max_new_tokens=LONGEST, alpha=ALPHA, seed=3)
        found = transfer_q(count, candidates, values, is_whole, **options)
        distances[rollouts] = total_variation(shares(found), exact_decoding())
    assert distances[16] < noise(P, count) < distances[1] + 0.1
    assert distances[16] < distances[1]
    assert total_variation(P, exact_decoding()) > noise(P, count)


def test_candidates_without_a_value_are_left_out():
    logps = np.log([0.5, 0.3, 0.2])
    found = tilted(logps, np.array([1.0, np.nan, 0.0]), alpha=1.0)
    np.testing.assert_allclose(
        found, np.array([0.5 * math.e, 0, 0.2]) / (0.5 * math.e + 0.2)
    )
    np.testing.assert_allclose(
        tilted(logps, np.full(3, np.nan), alpha=1.0), np.exp(logps)
    )
    np.testing.assert_allclose(
        tilted(logps, np.full(3, -np.inf), alpha=1.0), np.exp(logps)
    )
    impossible = np.array([0.0, -np.inf, -np.inf])
    for values in ([np.nan, 1.0, 2.0], [1.0, 2.0, np.nan]):
        found = tilted(impossible, np.array(values), alpha=1.0)
        np.testing.assert_array_equal(found, [1, 0, 0])


def test_tokens_that_the_model_cannot_choose_have_no_rollouts():
    def candidates(numbers, texts):
        return np.array([[2, 1, 0]] * 2), np.log([[1.0, 0, 0], [0, 0.5, 0.5]])

    def values(step, numbers, texts):
        assert (numbers, texts) == ([0, 1, 1], [(2,), (1,), (0,)])
        return [1.0, 0.0, 1.0]

    with np.errstate(divide="ignore"):
        options = dict(max_new_tokens=1, alpha=1e-3, seed=0)
        found = transfer_q(2, candidates, values, lambda text: True, **options)
    assert found == [(2,), (0,)]


@pytest.mark.parametrize("m", [2, 3, 5])
def test_neighboring_directions_are_uniform_within_the_angle(m):
    rng, limit = np.random.default_rng(0), math.radians(30)
    target = np.arange(1.0, m + 1)
    found = neighboring_directions(target, 4000, max_angle=limit, rng=rng)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    # The same from uniform directions, by rejection.
    every = rng.normal(size=(400_000, m))
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    cosines = every @ (target / np.linalg.norm(target))
    expected = np.sort(np.arccos(cosines[cosines > math.cos(limit)]))
    angles = np.arccos(np.clip(found @ target / np.linalg.norm(target), -1, 1))
    assert angles.max() <= limit + 1e-9
    for q in (0.1, 0.5, 0.9):
        share = np.mean(angles < np.quantile(expected, q))
        wide = math.sqrt(q * (1 - q)) * (1 / 4000 + 1 / len(expected)) ** 0.5
        assert abs(share - q) < 4 * wide
    assert (
        np.abs(found.mean(axis=0) / found.mean() - target / target.mean()).max() < 0.1
    )


def test_a_direction_without_a_length_is_refused():
    with pytest.raises(ValueError, match="not all 0"):
        neighboring_directions(
            np.zeros(2), 1, max_angle=0.1, rng=np.random.default_rng(0)
        )


def test_the_experiment_compares_the_methods(tmp_path, capsys):
    out = tmp_path / "x.json"
    options = more_samples.Options(
        json=str(out), prompts=3, draws=(1, 4), most_rollouts=1
    )
    more_samples.main(options)
    rows = json.loads(out.read_text())
    methods = [*more_samples.OF_DRAWS, "QAlign"]
    assert [(x["n"], x["method"]) for x in rows] == [
        *((1, method) for method in (*methods, "Transfer Q*", "guided")),
        *((4, method) for method in methods),
    ]
    draws = rows[: len(more_samples.OF_DRAWS)]
    assert len({x["true"] for x in draws}) == 1  # one draw leaves no choice
    # A reward reads as many tokens as are generated, and four rewards four times.
    length = rows[methods.index("majority")]["tokens"]
    assert [x["tokens"] / length for x in draws] == pytest.approx([2, 2, 1, 5, 5])
    assert capsys.readouterr().out.count("QAlign") == 2


def test_the_autoregressive_reward_model_of_all_labels():
    world = more_samples.make_world(np.random.default_rng(3), 1.5)
    rewards = {text: r[0] for text, r in world.rewards.items()}
    normalizer = scipy.special.logsumexp(list(rewards.values()))
    for text, reward in [*rewards.items()][::50]:
        logp = sum(world.guide[text[:n]][text[n]] for n in range(len(text)))
        assert logp == pytest.approx(reward - normalizer)
