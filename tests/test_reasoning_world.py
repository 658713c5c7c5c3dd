"""The reasoning world, its exact sums against brute force, and the experiment."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import bvpo_solutions as solutions
from experiments import reasoning_errors as errors
from experiments import reasoning_gradients as sums
from experiments import reasoning_world as world
from jaxpref.data import DataOptions, ListSource, load_tokenizer, make_mixed_splits
from jaxpref.errors import InputError
from jaxpref.gradients import bvpo
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture

BETA = 0.7


def tiny_model(seed, **sizes):
    """A random model with five words and 2 x 4 numbers per layer."""
    architecture = LlamaArchitecture(
        **(dict(vocab_size=5, hidden_size=8, intermediate_size=8) | sizes),
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        initializer_range=0.5,
    )
    numerics = Numerics(param_dtype="float64", compute_dtype="float64")
    model = build(architecture, numerics)
    return model, model.init(jax.random.key(seed))


@pytest.fixture
def wide():
    """Double precision, for finite differences and exact sums."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def everything():
    """A language with all pairs of five words as traces, and each word as an answer."""
    return sums.Language(
        prompts=np.array([[0, 1, 2], [0, 3, 3], [0, 4, 1]], np.int32),
        traces=np.array(list(itertools.product(range(5), repeat=2)), np.int32),
        empty=np.array([3, 4], np.int32),
        answers=np.arange(5, dtype=np.int32),
        eos=2,
    )


# ---- the world ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, answer, reward",
    [
        ("1 2 1 =", "4", 1.0),
        ("1 2 1 =", " 4 ", 1.0),
        ("1 2 1 =", "3", 0.0),
        ("4 4 4 =", "12", 1.0),
        ("4 4 4 =", "2", 0.0),
        ("0 0 0 =", "0", 1.0),
        ("0 0 0 =", "0 0", 0.0),
        ("0 0 0 =", "", 0.0),
    ],
)
def test_gold_reward_of_answers_by_hand(prompt, answer, reward):
    assert world.gold_reward(prompt, answer) == reward


@pytest.mark.parametrize("prompt", ["", "1 2 3", "1 2 5 =", "1 2 3 4 =", "so x y 1"])
def test_prompts_outside_the_world_are_rejected(prompt):
    with pytest.raises(ValueError, match="not a prompt of this world"):
        world.gold_reward(prompt, "1")


def test_numbers_of_distinct_traces_and_prompts():
    traces, prompts = world.all_traces(), world.all_prompts()
    assert len(set(traces)) == len(traces) == 2 * 6 * 9
    assert len(set(prompts)) == len(prompts) == 5**3
    rewards = world.gold_rewards(prompts)
    assert rewards.shape == (125, 13) and (rewards.sum(axis=1) == 1).all()


def test_held_out_prompts_have_every_number_in_every_position():
    train, held = world.split_prompts()
    assert sorted([*train, *held]) == list(range(125)) and len(held) == 25
    places = np.array([world.numbers(world.all_prompts()[n]) for n in held]).T
    assert all((np.bincount(place) == 5).all() for place in places)


def test_demonstrations_are_in_the_language_and_have_the_stated_errors():
    rows = world.write_demonstrations(8000, seed=3)
    assert rows == world.write_demonstrations(8000, seed=3)
    traces = set(world.all_traces())
    right = {True: [], False: []}
    for row in rows:
        bare = row["prompt"].removesuffix("<think></think>")
        thinks = bare == row["prompt"]
        answer = row["completion"]
        if thinks:
            trace, _, answer = answer.removeprefix("<think>").partition("</think>")
            assert trace in traces
        right[thinks].append(world.gold_reward(bare, answer))
    # Two errors cancel half of the time, and more often at an end.
    assert len(right[True]) == len(right[False]) == 4000
    assert abs(np.mean(right[False]) - 0.4) < 4 * np.sqrt(0.24 / 4000)
    assert 0.7**2 + 0.3**2 / 2 - 0.03 < np.mean(right[True]) < 0.6


def test_training_reads_pairs_like_the_exact_sums(tmp_path):
    world.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    language = sums.read_language(tokenizer)
    assert len(np.unique(language.traces, axis=0)) == len(language.traces)
    prompts, traces = world.all_prompts(), world.all_traces()
    record = world.trace_pair(prompts[37], (traces[5], "1"), (traces[70], "4"))
    options = DataOptions(heldout_fraction=0.0)
    pairs = make_mixed_splits(ListSource([record]), tokenizer, options).train
    assert pairs.columns["empty_trace"].tolist() == [False, True]
    (empty,) = sums.empty_sequences(language, np.array([[37, 1, 4]]))
    for side, (trace, answer) in enumerate([(5, 1), (70, 4)]):
        whole = np.concatenate([pairs.prompt(0), pairs.completion(0, side)])
        expected = sums.trace_sequences(language, 37, answer)[trace]
        assert whole.tolist() == expected.tolist()
        assert len(pairs.prompt(0)) == language.prompts.shape[1]
        whole = np.concatenate([pairs.prompt(1), pairs.completion(1, side)])
        assert whole.tolist() == empty[side].tolist()
        assert tokenizer.unk_token_id not in whole


def test_drawn_pairs_have_the_expected_frequencies():
    prompts = np.array([3, 8])
    rng = np.random.default_rng(0)
    joint = np.log(rng.dirichlet(np.ones(2 * 13), size=2)).reshape(2, 2, 13)
    empty = np.log(rng.dirichlet(np.ones(13), size=2))
    count = 8000
    found = world.draw_pairs(np.random.default_rng(1), joint, empty, prompts, count)
    right = world.gold_rewards(world.all_prompts())[prompts].argmax(axis=1)
    for pairs, logps in zip(found, (joint, empty[:, None])):
        at = np.searchsorted(prompts, pairs[:, 0])
        assert (pairs[:, 1] == right[at]).all() and (pairs[:, 2] != pairs[:, 1]).all()
        # In pairs with one right answer, wrong answers have their overall frequencies.
        kept = np.exp(logps)
        kept[np.arange(2), :, right] = 0
        p = np.exp(logps)[np.arange(2), :, right].sum(axis=1)
        weight = p * (1 - p)
        table = kept / kept.sum(axis=(1, 2), keepdims=True)
        table *= (weight / weight.sum())[:, None, None]
        drawn = np.zeros_like(table)
        np.add.at(drawn, (at, pairs[:, 4], pairs[:, 2]), 1 / count)
        assert np.abs(drawn - table).max() < 4 * np.sqrt(0.25 / count)


# ---- exact sums --------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_the_enumeration_is_the_chain_rule_and_sums_to_one(wide, everything):
    model, params = tiny_model(0)
    joint, empty = sums.answer_logps(model, params, everything, [0, 2])
    # Any word may follow any word here, so nothing is outside the language.
    np.testing.assert_allclose(np.exp(joint).sum(axis=(1, 2)), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(empty).sum(axis=1), 1, rtol=1e-12)
    # Token by token, for all answers to prompt 2.
    # (Padded behind, which causal attention does not see: one program for all.)
    all_logits = jax.jit(model.logits)
    prompt = everything.prompts[2].tolist()

    def logits(ids):
        padded = np.array([[*ids, 0, 0, 0][:5]])
        return np.asarray(all_logits(params, padded))[0, len(ids) - 1]

    for answer in range(5):
        total = 0.0
        for first, second in itertools.product(range(5), repeat=2):
            p = softmax(logits(prompt))[first]
            p *= softmax(logits([*prompt, first]))[second]
            total += p * softmax(logits([*prompt, first, second]))[answer]
        marginal = np.exp(joint[1, :, answer]).sum()
        assert marginal == pytest.approx(total, rel=1e-10)
    alone = softmax(logits([*prompt, 3, 4]))
    np.testing.assert_allclose(np.exp(empty[1]), alone, rtol=1e-10)


def test_expected_rewards_by_hand():
    joint = np.log([[[0.1, 0.2], [0.3, 0.2]]])
    found = sums.expected_rewards(joint, np.log([[0.25, 0.5]]), np.array([[1.0, 0.0]]))
    assert found == pytest.approx(
        {"reward": 0.4, "empty_reward": 0.25, "language": 0.8}
    )


@pytest.fixture
def away(wide, everything):
    """A policy away from its reference, two pairs, and their exact gradients."""
    model, params = tiny_model(1)
    _, base = tiny_model(2)
    pairs = np.array([[0, 1, 3], [2, 4, 0]])
    base_logps = sums.trace_logps(model, base, everything, pairs)
    found = sums.exact(model, params, everything, pairs, base_logps, beta=BETA)
    return model, params, pairs, base_logps, found


def test_the_marginal_gradient_matches_finite_differences(away, everything):
    model, params, pairs, base_logps, found = away
    flat, unravel = ravel_pytree(params)
    loss = jax.jit(
        lambda flat, n: sums.marginal_loss(
            model, unravel(flat), everything, pairs[n], base_logps[n], beta=BETA
        ),
        static_argnums=1,
    )
    for n in range(2):
        for seed in range(3):
            v = np.random.default_rng(seed).normal(size=flat.shape)
            gradient = (loss(flat + 1e-5 * v, n) - loss(flat - 1e-5 * v, n)) / 2e-5
            assert found.marginal[n] @ v == pytest.approx(float(gradient), rel=1e-6)


def test_mean_and_variance_of_trace_gradients_over_all_draws(away, everything):
    model, params, pairs, base_logps, found = away
    count = len(everything.traces)
    a, b = np.divmod(np.arange(count**2), count)
    for n in range(2):
        rows = np.asarray(sums.pair_sequences(everything, pairs[n]))
        base = np.asarray(base_logps[n])
        grads = sums.drawn_gradients(
            model,
            params,
            np.stack([rows[0][a], rows[1][b]], axis=1),
            np.stack([base[0][a], base[1][b]], axis=1),
            start=3,
            beta=BETA,
        )
        chance = softmax(base[0])[a] * softmax(base[1])[b]
        mean = chance @ np.asarray(grads)
        np.testing.assert_allclose(found.trace_mean[n], mean, rtol=1e-8, atol=1e-12)
        variance = chance @ np.sum((np.asarray(grads) - mean) ** 2, axis=1)
        assert found.trace_variance[n] == pytest.approx(variance, rel=1e-8)
        assert np.abs(mean - found.marginal[n]).max() > 1e-4  # stale traces: a bias


def test_the_trace_gradient_is_unbiased_at_the_reference(wide, everything):
    model, params = tiny_model(3)
    pairs = np.array([[1, 0, 2]])
    base_logps = sums.trace_logps(model, params, everything, pairs)
    found = sums.exact(model, params, everything, pairs, base_logps, beta=BETA)
    np.testing.assert_allclose(found.trace_mean, found.marginal, rtol=1e-9, atol=1e-13)


# ---- errors of mixtures ------------------------------------------------------------


def test_true_ingredients_give_the_error_over_all_batches(wide):
    # Batches of one pair and one trace can all be enumerated.
    rng = np.random.default_rng(0)
    marginal, empty = rng.normal(size=(2, 3, 4))
    draws = rng.normal(size=(3, 2, 4)) + marginal[:, None] + 0.3  # two likely traces
    found = sums.Exact(marginal, draws.mean(axis=1), draws.var(axis=1).sum(axis=1))
    population = errors.Population(np.zeros((3, 3), int), None, found, empty)
    truth = errors.true_ingredients(population, batch=1, traces=1)
    for alpha in (0.0, 0.3, 1.0):
        by_kind = {kind: [] for kind in errors.KINDS}
        for i, k, j in itertools.product(range(3), range(2), range(3)):
            mixed = alpha * draws[i, k] + (1 - alpha) * empty[j]
            by_kind["traces"].append(np.sum((mixed - marginal[i]) ** 2))
            off = mixed - marginal.mean(axis=0)
            by_kind["traces and pairs"].append(np.sum(off**2))
        for kind, found in by_kind.items():
            error = float(bvpo.mean_squared_error(alpha, **truth[kind]))
            assert error == pytest.approx(np.mean(found), rel=1e-6)


def test_measured_errors_and_variances_approach_the_exact_ones(wide, everything):
    model, params = tiny_model(1)
    _, base = tiny_model(2)
    pairs = np.array([[0, 1, 3], [2, 4, 0], [1, 0, 2]])
    population = errors.make_population(
        model, params, base, everything, pairs, pairs[::-1], beta=BETA
    )
    truth = errors.true_ingredients(population, batch=2, traces=2)
    records = errors.measure_errors(
        model,
        params,
        everything,
        tuple(vars(population).values()),
        jax.random.key(0),
        steps=2000,
        batch=2,
        traces=2,
        beta=BETA,
        decay=0.99,
    )
    variances = errors.measure_variances(
        model,
        params,
        everything,
        population,
        jax.random.key(1),
        batch=2,
        redraws=2000,
        beta=BETA,
    )
    for kind, found in records.items():
        exact = [float(bvpo.mean_squared_error(a, **truth[kind])) for a in errors.GRID]
        np.testing.assert_allclose(errors.errors_by_alpha(found), exact, rtol=0.1)
        # The error of auto is that of its alphas.
        assert np.mean(found["auto"]) < 1.1 * max(exact)
        assert np.all((found["alpha"] >= 0) & (found["alpha"] <= 1))
    np.testing.assert_allclose(
        variances["measured"], variances["law"], rtol=0.1, atol=1e-12
    )


# ---- real solutions and the whole --------------------------------------------------


def test_solutions_of_one_question_are_traces_of_its_answer(tmp_path):
    right, wrong = "1+1=2\nA: 2", "1+1=3\nA: 3"
    row = {"idx": 7, "prompt": "1+1?", "chosen": right, "rejected": wrong}
    lonely = row | {"idx": 8, "prompt": "2+2?"}
    other = row | {"chosen": "one and one\nis two\nA: 2", "rejected": "no\nA: 4"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, lonely, other, row)))
    assert solutions.read_records(path, 1) == [
        {
            "prompt": "1+1?\n",
            "chosen": {"trace": ["1+1=2", "one and one\nis two"], "answer": "2"},
            "rejected": {"trace": ["1+1=3"], "answer": "3"},
        }
    ]
    with pytest.raises(InputError, match="ask for fewer"):
        solutions.read_records(path, 2)
    path.write_text(json.dumps(row | {"chosen": "2"}) + "\n")
    with pytest.raises(InputError, match="row 1: 'chosen' has no line"):
        solutions.read_records(path, 1)


def test_the_real_file_has_questions_with_several_solutions(shared):
    path = shared / "data" / "gsm8k_solution_pairs.jsonl.gz"
    records = solutions.read_records(path, 200)
    assert all(len(set(r["chosen"]["trace"])) > 1 for r in records)
    assert all(r["chosen"]["answer"] != r["rejected"]["answer"] for r in records)


@pytest.mark.slow
def test_bvpo_from_command_to_report(shared, tmp_path):
    root, out = Path(__file__).resolve().parents[1], tmp_path / "smoke"
    command = [sys.executable, "-m", "experiments.bvpo", "--smoke", "--out", str(out)]
    command += ["--data", str(shared / "data" / "gsm8k_solution_pairs.jsonl.gz")]
    command += ["--model", str(shared / "models" / "stories260k-hf")]

    def go():
        environment = os.environ | {"XLA_FLAGS": ""}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True,
            timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((out / "results.json").read_text())

    made = go()
    assert [run["alpha"] for run in made["trained"]] == [0.5, "auto"]
    assert [g["place"] for g in made["gradients"]] == [
        "at the reference",
        "at the reference, 32 pairs",
        "after training",
    ]
    for found in made["gradients"]:
        for kind in errors.KINDS:
            assert np.isfinite(found["kinds"][kind]["errors"]).all()
            assert 0 <= found["kinds"][kind]["auto_alpha"] <= 1
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    for name in ("errors", "variances", "rewards", "alpha", "solutions"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # Repeating the command trains nothing, and reports what it did not time.
    resumed = go()
    assert resumed.pop("seconds") is None and made.pop("seconds") > 0
    assert resumed == made
