"""Which prompts are answered in training, and metrics of held-out ones."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.data import DatasetBuilder, PackedLayout
from jaxpref.errors import InputError
from jaxpref.online.answers import Group
from jaxpref.online.batch import batch_of, with_slots
from jaxpref.online.draws import draw_groups
from jaxpref.online.heldout import heldout_metrics, warn_of_missing
from jaxpref.online.options import SamplingOptions
from jaxpref.online.pass_rates import PassRates
from jaxpref.online.prompts import with_answers
from jaxpref.online.token_logps import (
    REFERENCE_LOGPS,
    SAMPLER_LOGPS,
    answer_kls,
)
from jaxpref.report.progress import best_criterion, evaluation_line
from jaxpref.sampling import Answer
from tests.batches import batch_of_owners

PROMPTS, SIZE, ANSWERS = 40, 6, 4
UNKNOWN = PassRates(np.full(PROMPTS, np.nan, np.float32))


def order(step: int, size: int) -> np.ndarray:
    return (step * size + np.arange(size)) % PROMPTS


def verifier(rates: np.ndarray, calls: list):
    """Answers that are right with a probability for each prompt."""

    def answer(indices, first):
        random = np.random.default_rng([len(calls), *indices])
        calls.append((list(indices), first))
        right = random.random((len(indices), ANSWERS)) < rates[list(indices), None]
        groups = [Group(n, ()) for n in indices]
        return groups, [[str(n)] for n in indices], right.astype(np.float32)

    return answer


def draw(answer, number=0, rates=UNKNOWN, seed=0, **options):
    sampling = SamplingOptions(**options)
    return draw_groups(
        answer, order, rates, number=number, size=SIZE, seed=seed, sampling=sampling
    )


def test_pass_rates_by_hand():
    rates = PassRates(np.full(4, np.nan, np.float32))
    assert np.isnan(rates.expected()).all()
    rewards = np.array([[1.0, 0.0], [1.0, np.nan], [np.nan, np.nan]])
    rates = rates.updated([0, 1, 3], rewards)
    # The others are expected to have the mean of the new ones.
    np.testing.assert_allclose(rates.expected(), [0.5, 1.0, 0.75, 0.75])
    rates = rates.updated([0, 0, 2], np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    # 0.5 -> 0.75 -> 0.375; of new prompts 0.75 -> 0.375.
    np.testing.assert_allclose(rates.expected(), [0.375, 1.0, 0.0, 0.375])
    # The first of eight is taken whatever its mean; 1 and 2 are equally far.
    nearest = rates.nearest(np.array([2, 1, 3, 2, 0]), 0.5, 4)
    np.testing.assert_array_equal(nearest, [2, 3, 0, 1])
    np.testing.assert_array_equal(rates.nearest(np.array([1, 3]), 0.5, 1), [3])


def test_groups_of_equal_rewards_are_replaced():
    """By prompts that the step has not answered; the places of others are kept."""
    solvable = np.where(np.arange(PROMPTS) % 2, 0.5, 0.0)
    calls = []
    drawn = draw(verifier(solvable, calls), number=1, resample_uniform=3)
    again = draw(verifier(solvable, []), number=1, resample_uniform=3)
    assert drawn.groups == again.groups
    np.testing.assert_array_equal(drawn.rewards, again.rewards)
    first, *others = calls
    assert first == ([*order(1, SIZE)], 0)
    assert [place for _, place in others] == [SIZE * n for n in range(1, len(calls))]
    answered = [n for indices, _ in calls for n in indices]
    assert len({*answered}) == len(answered) == drawn.metrics["prompts/answered"]
    assert drawn.metrics["draws"] == len(calls) > 1
    assert [[str(group.index)] for group in drawn.groups] == drawn.texts
    plain = draw(verifier(solvable, []), number=1)
    assert plain.metrics == {}
    varies = plain.rewards.max(1) > plain.rewards.min(1)
    np.testing.assert_array_equal(drawn.rewards[varies], plain.rewards[varies])
    kept = drawn.rewards.max(1) > drawn.rewards.min(1)
    assert kept.sum() > varies.sum()
    # The estimates know all answers, also those that were replaced.
    assert np.isfinite(drawn.rates.of_prompts).sum() == len(answered)


def test_draws_end():
    """After the maximum, or as soon as all rewards differ, or no prompt is left."""
    calls = []
    never = np.zeros(PROMPTS)
    assert draw(verifier(never, calls), resample_uniform=2).metrics["draws"] == 3
    calls.clear()
    drawn = draw(verifier(never, calls), resample_uniform=99)
    assert sum(len(indices) for indices, _ in calls) == PROMPTS
    assert len(drawn.groups) == SIZE

    def differ(indices, first):
        rewards = np.tile(np.float32([0, 1, 0, 1]), (len(indices), 1))
        return [Group(n, ()) for n in indices], [[""]] * len(indices), rewards

    assert draw(differ, resample_uniform=2).metrics["draws"] == 1


def test_prompts_near_the_target_are_drawn():
    """And another step, seed or state draws others."""
    random = np.random.default_rng(0)
    true = random.random(PROMPTS)
    rates, near, expected = UNKNOWN, [], []
    for number in range(200):
        options = {"prompt_target": 0.5, "prompt_candidates": 3}
        drawn = draw(verifier(true, []), number, rates, **options)
        again = draw(verifier(true, []), number, rates, **options)
        assert drawn.groups == again.groups
        if number >= 50:
            near += [abs(true[group.index] - 0.5) for group in drawn.groups]
            expected.append(drawn.metrics["prompts/expected"])
        else:
            assert ("prompts/expected" in drawn.metrics) == (number > 0)
        rates = drawn.rates
    assert np.mean(near) < 0.7 * np.mean(np.abs(true - 0.5))
    assert abs(np.mean(expected) - 0.5) < 0.05
    chosen = lambda **changes: [
        group.index
        for group in draw(
            verifier(true, []), **{"number": 7, "prompt_target": 0.5} | changes
        ).groups
    ]
    assert chosen() != chosen(number=8) and chosen() != chosen(seed=1)
    assert chosen() != chosen(rates=rates)
    with pytest.raises(InputError, match="prompt_candidates"):
        SamplingOptions(prompt_candidates=0)


def test_a_prompt_whose_first_answers_failed_comes_back():
    """Although every other prompt is nearer to the target."""
    means = np.full(PROMPTS, 0.5, np.float32)
    means[0] = 0.0
    answer, rates = verifier(means, []), PassRates(means)
    steps = [draw(answer, n, rates, prompt_target=0.5).groups for n in range(400)]
    answered = [[group.index for group in groups] for groups in steps]
    # One of six prompts is drawn at random from 40.
    assert 2 <= sum(0 in indices for indices in answered) <= 22  # 10 expected


def test_packed_rows_have_room_for_any_prompts():
    """A row for each prompt is enough, however long the prompts of a step are."""
    layout = PackedLayout(
        row_length=64, predictions=32, slots=2, num_completions=2, rows=4,
        batch_size=10, accumulation=2,
    )  # fmt: skip
    assert with_slots(layout).accumulation == 3
    assert with_slots(dataclasses.replace(layout, accumulation=5)).accumulation == 5


def test_shorter_answers_may_need_more_rows_than_the_longest():
    """First-fit-decreasing puts these pairs in 4 rows, and with fewer tokens in 5.

    The batch has all of them, with the weights and masks of the pairs.
    """
    prompts, given = (21, 15, 22, 23, 26, 17, 9, 4), (8, 3, 11, 23, 2, 20, 10, 39)
    longest, sampled = 6, (5, 6, 5, 4, 3, 6, 4, 5)
    builder = DatasetBuilder(1)
    for n, (before, after) in enumerate(zip(prompts, given)):
        columns = {"weight": n / 8}
        builder.add([2] * before, [[3] * after], id=f"{n}-1", columns=columns)
    pairs = builder.build()
    trained = np.random.default_rng(0).random(len(pairs.tokens)) < 0.8
    options = SamplingOptions(group_size=1, max_new_tokens=longest)
    for mask in (None, trained):
        train = with_answers(dataclasses.replace(pairs, trained=mask), options)
        layout = PackedLayout(
            row_length=77, predictions=54, slots=8, num_completions=2, rows=4,
            batch_size=8,
        )  # fmt: skip
        in_order = lambda step, size: np.arange(size)
        next(layout.batches(dataclasses.replace(train, trained=None), in_order))
        groups = [
            Group(n, (Answer([4] * k, 0.0, True),)) for n, k in enumerate(sampled)
        ]
        batch, places = batch_of(groups, np.ones((8, 1)), train, with_slots(layout))
        np.testing.assert_array_equal(np.sort(places[places >= 0]), np.arange(8))
        if mask is None:
            assert (batch.pair_index >= 0).any(-1).sum() == 5
        np.testing.assert_array_equal(
            batch.weights[places >= 0], places[places >= 0] / 8
        )
        targets = np.asarray(batch.targets)
        assert (targets == 4).sum() == sum(sampled)
        of_pairs = sum(given)
        if mask is not None:
            of_pairs = sum(len(train.targets(n, 0)) for n in range(8))
            assert of_pairs < sum(given)
        assert (targets == 3).sum() == of_pairs


def test_metrics_of_held_out_answers_by_hand(capsys):
    answers = Answer([3, 4], -1.0, True), Answer([5], -2.0, False)
    groups = [Group(0, answers), Group(1, answers[::-1])]
    rewards = np.array([[1.0, np.nan], [0.0, 0.5]], np.float32)
    found = heldout_metrics(groups, rewards, np.array([[0.5, 1.0], [0.5, 2.0]]))
    assert found == {
        "eval_rewards/mean": 0.5,
        "eval_rewards/missing": 0.25,
        "eval_lengths": 1.5,
        "eval_ended": 0.5,
        "eval_kl": 1.0,
    }
    warn_of_missing(rewards)
    assert "1 of 4 answers to the held-out prompts have no" in capsys.readouterr().out
    warn_of_missing(np.zeros((2, 2)))
    assert not capsys.readouterr().out
    nothing = heldout_metrics(groups, np.full((2, 2), np.nan), None)
    assert math.isnan(nothing["eval_rewards/mean"]) and "eval_kl" not in nothing
    assert evaluation_line(3, found) == "step 3: eval reward 0.5"
    lines = [{"step": 3, **found}, {"step": 3, "loss": 1.0}]
    assert best_criterion(None, lines) == "max:eval_rewards/mean"
    assert best_criterion(None, [{"step": 3, "eval_loss": 1.0}]) == "min:eval_loss"


def test_divergence_of_each_answer():
    """Against sums of ref/pi - 1 - log(ref/pi) in NumPy; padding is not read."""
    policy = np.array([[[[-1.0, -2.0, -0.5, np.nan]]]])
    reference = np.array([[[[-1.5, -1.0, -0.5, np.nan]]]])
    owners = np.array([[[[0, 0, 1, -1]]]], np.int32)
    batch = batch_of_owners(owners, np.array([[[[2, 1, 0]]]], np.int32))
    logps = {SAMPLER_LOGPS: policy, REFERENCE_LOGPS: reference}
    found, _ = answer_kls(batch, {name: jnp.asarray(x) for name, x in logps.items()})
    k3 = lambda ratio: np.exp(ratio) - 1 - ratio
    expected = [k3(-0.5) + k3(1.0), k3(0.0), 0.0]
    np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-6, atol=1e-7)
