"""Losses in the engine: what they are fed, and what a batch may be split into."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.cli.objectives import FACTORIES, LOSSES
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.objectives import beta_dpo, from_loss
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.rewards import per_token_reward
from jaxpref.scoring import make_scorer
from jaxpref.scoring.scores import (
    TOKEN_SCORES,
    Scored,
    reads_reference,
    stored_scores,
)
from jaxpref.train.gradient import gradient
from tests.losses.table import TABLE
from tests.test_train_losses import REQUIRED
from tests.test_training import few_steps, pairs  # noqa: F401
from tests.tiny import padded_batches, tiny_config, tiny_params

COUPLED = {
    "dr_dpo": from_loss(losses.dr_dpo, beta=0.5),
    "kl_dpo": from_loss(losses.kl_dpo, beta=0.5),
    "aot": from_loss(losses.aot, beta=0.5),
    "aot_unpaired": from_loss(losses.aot_unpaired, beta=0.5),
    "gamma_simpo": from_loss(losses.gamma_simpo, beta=2.0, gamma=0.5),
    "beta_dpo": beta_dpo(beta=0.5, alpha=0.6),
}


SLOW = {"kl_dpo", "aot_unpaired", "gamma_simpo"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COUPLED],
)
def test_a_coupled_loss_sees_the_whole_batch(pairs, name):  # noqa: F811
    """Micro-batches and devices change nothing but rounding, and couple for certain."""
    whole, _ = few_steps(pairs, objective=COUPLED[name])
    split, _ = few_steps(pairs, objective=COUPLED[name], accumulation=4)
    np.testing.assert_allclose(split, whole, rtol=1e-4)
    if name in ("dr_dpo", "beta_dpo"):
        sharded, _ = few_steps(pairs, objective=COUPLED[name], sizes=(4, 1, 2))
        np.testing.assert_allclose(sharded, whole, rtol=1e-4)


def few_pairs(pairs, count, **options):  # noqa: F811
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    options |= dict(batch_size=count, reference=zeros)
    return jax.tree.map(jnp.asarray, next(padded_batches(pairs, **options)))


def one_weight_step(objective, batch, dtype=jnp.float32):
    """Gradient, next state and metrics of a "model" of log-probs w for every token."""
    logps = lambda w, batch: {"policy_logps": w * batch.completion_lengths}
    score = lambda w, batch: Scored(logps(w, batch), {})
    step = jax.jit(functools.partial(gradient, objective, score))
    return step(dtype(-1), batch, objective.init(0))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"gamma_simpo"}))
def test_the_pair_that_is_not_finite_is_named_and_no_other(pairs, name, accumulation):  # noqa: F811
    objective = COUPLED[name]
    batch = few_pairs(pairs, 8, accumulation=accumulation)
    logps = batch.reference["reference_logps"]
    where = (0, 5, 0, 1) if accumulation == 1 else (2, 1, 0, 1)
    bad = {"reference_logps": logps.at[where].set(jnp.nan)}
    batch = dataclasses.replace(batch, reference=bad)
    _, _, metrics = one_weight_step(objective, batch)
    assert not np.isfinite(metrics["loss"])
    named = np.asarray(metrics["nonfinite_pairs"])
    assert named[named >= 0].tolist() == [batch.pair_index[where[:3]]]


LIVE = {
    "tdpo1": from_loss(losses.tdpo1, beta=0.5),
    "tdpo2": from_loss(losses.tdpo2, beta=0.5),
    "wpo": from_loss(losses.wpo, beta=0.5),
    "ld_dpo": from_loss(losses.ld_dpo, beta=0.5),
}


@pytest.mark.parametrize(
    "name",
    [
        "tdpo1",
        pytest.param("tdpo2", marks=pytest.mark.slow),
        pytest.param("wpo", marks=pytest.mark.slow),
        "ld_dpo",
    ],
)
def test_losses_of_more_than_log_probs(pairs, name):  # noqa: F811
    """They start where DPO starts, and do not depend on the layout."""
    history, _ = few_steps(pairs, objective=LIVE[name])
    if name == "wpo":  # log 2 times weights of at most 1
        assert 0 < history[0, 0] < np.log(2)
    else:
        assert history[0, 0] == pytest.approx(np.log(2), abs=1e-6)
    sharded, _ = few_steps(pairs, objective=LIVE[name], sizes=(2, 2, 2), accumulation=2)
    np.testing.assert_allclose(sharded, history, rtol=1e-4)


def test_only_whole_distributions_keep_the_reference():
    scores = {name: o.scores for name, o in (COUPLED | LIVE).items()}
    live = {name: set(o.models) for name, o in (COUPLED | LIVE).items() if o.models}
    assert live == {"tdpo1": {"reference"}, "tdpo2": {"reference"}}
    both = {"reference_logps", "reference_prefix_logps"}
    assert stored_scores(scores["ld_dpo"]) == both
    assert stored_scores(scores["wpo"]) == {"reference_logps"}
    assert not reads_reference(scores["gamma_simpo"])
    assert reads_reference(scores["tdpo1"]) and not stored_scores(scores["tdpo1"])


# Every score alone, where it can be, and beside those of other statistics.
COMBINATIONS = (
    ("kls",),
    ("log_weights",),
    ("policy_prefix_logps",),
    ("kls", "log_weights"),
    ("kls", "reference_prefix_logps"),
    ("kls", "policy_prefix_logps", "reference_logps"),
    tuple(TOKEN_SCORES),
)


def test_scores_are_sums_over_the_models_full_distributions(pairs):  # noqa: F811
    model = build(tiny_config())
    params, reference = tiny_params(model), tiny_params(model, seed=1)
    batch = next(padded_batches(pairs, batch_size=4))
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    scorers = [make_scorer(model, frozenset(x), chunk_size=4) for x in COMBINATIONS]
    # In one program, which shares the models' passes.
    found = jax.jit(lambda *args: [scorer(*args).scores for scorer in scorers])(
        params, {"reference": reference}, micro
    )
    for names, scorer, scores in zip(COMBINATIONS, scorers, found):
        assert scores.keys() == scorer.scores == {*names, "policy_logps"}
    assert set().union(*found) == TOKEN_SCORES.keys()
    of_tokens = found[-1]["policy_token_logps"]
    owners = np.asarray(batch.completions[0])
    for row, n in enumerate(batch.pair_index[0, :, 0]):
        prompt = pairs.prompt(n)
        shorter = min(len(pairs.completion(n, side)) for side in (0, 1))
        for side in (0, 1):
            completion = pairs.completion(n, side)
            tokens = jnp.asarray([[*prompt, *completion]])
            at = slice(len(prompt) - 1, -1)
            table, other = (
                np.asarray(jax.nn.log_softmax(model.logits(p, tokens)[0, at]), float)
                for p in (params, reference)
            )
            chosen = np.arange(len(completion)), completion
            logps, reference_logps = table[chosen], other[chosen]
            ours = np.asarray(of_tokens[row])[owners[row] == side]
            np.testing.assert_allclose(ours, logps, rtol=2e-5, atol=2e-5)
            expected = {
                "policy_logps": logps.sum(),
                "policy_prefix_logps": logps[:shorter].sum(),
                "reference_logps": reference_logps.sum(),
                "reference_prefix_logps": reference_logps[:shorter].sum(),
                "kls": (np.exp(other) * (other - table)).sum(),
                "log_weights": (logps - np.log(np.exp(2 * table).sum(-1))).mean(),
            }
            for scores in found:
                own = {k: x for k, x in scores.items() if "token" not in k}
                for name, values in own.items():
                    ours, value = values[row, 0, side], expected[name]
                    np.testing.assert_allclose(ours, value, rtol=2e-5, atol=2e-5)


def averages_tokens(loss, reads, options):
    """Whether a loss averages log-probabilities over tokens, from its gradient.

    That of the rejected answer halves where all answers are twice as long and as
    unlikely, and the policy equals its reference.
    """
    if not {"policy_rejected_logps", "rejected_lengths"} <= set(reads):
        return False

    def gradient_at(tokens):
        def summed(rejected):
            arrays = {name: jnp.full(1, -tokens) for name in reads}
            arrays |= {n: jnp.full(1, tokens) for n in reads if n.endswith("lengths")}
            arrays["policy_rejected_logps"] = rejected
            return jnp.sum(loss(*arrays.values(), **options))

        return float(jax.grad(summed)(jnp.full(1, -tokens))[0])

    return abs(gradient_at(2.0) / gradient_at(1.0) - 0.5) < 1e-3


def test_losses_that_average_over_tokens_declare_it():
    averaged = set()
    for name, loss in LOSSES.items():
        if name in FACTORIES:
            assert not per_token_reward(loss)
            continue
        objective = from_loss(loss, **REQUIRED.get(name, {}))
        averages = averages_tokens(loss, objective.reads, objective.options)
        assert averages == per_token_reward(loss), name
        if averages:
            averaged.add(name)
    assert averaged == {
        "alpha_po",
        "gamma_simpo",
        "ipo_averaged",
        "ln_dpo",
        "mapo",
        "orpo",
        "simpo",
    }


@pytest.mark.parametrize("loss", [losses.dpo, losses.simpo])
@pytest.mark.parametrize("corrected", [losses.unbiased, losses.forward_corrected])
def test_a_corrected_loss_declares_what_its_own_does(corrected, loss):
    found = corrected(functools.partial(loss, beta=2.0), 0.2)
    objective = from_loss(found)
    averages = averages_tokens(found, objective.reads, objective.options)
    assert averages == per_token_reward(found) == (loss is losses.simpo)


def test_steps_can_be_traced_for_devices_that_are_only_described():
    mesh = jax.sharding.AbstractMesh((2,), ("data",), (jax.sharding.AxisType.Explicit,))
    objective = from_loss(losses.simpo)
    logps = jax.ShapeDtypeStruct((1, 4, 1, 2), jnp.float32)
    scores = {"policy_logps": logps}
    empty = jnp.zeros((1, 4, 1), jnp.int32)
    batch = types.SimpleNamespace(
        pair_index=empty,
        completion_lengths=jnp.ones((1, 4, 1, 2), jnp.int32),
        reference={},
    )
    with jax.sharding.use_abstract_mesh(mesh):
        found = jax.eval_shape(lambda s: objective.metrics(Inputs(s, batch)), scores)
    assert found["rewards/margins"].shape == ()


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        (losses.beta_dpo, "running_mean"),
        (losses.reward_regression, "targets"),
    ],
)
def test_a_loss_that_pairs_cannot_feed_is_refused_at_once(loss, missing):
    with pytest.raises(InputError, match=missing):
        from_loss(loss)


def test_a_side_with_a_beta_of_its_own_is_rewarded_by_it(pairs):  # noqa: F811
    objective = from_loss(losses.flex_dpo, chosen_beta=0.5, rejected_beta=0.25)
    _, _, metrics = one_weight_step(objective, batch := few_pairs(pairs, 8))
    chosen, rejected = np.asarray(batch.completion_lengths).mean((0, 1, 2))
    assert metrics["rewards/chosen"] == pytest.approx(-0.5 * chosen)
    assert metrics["rewards/rejected"] == pytest.approx(-0.25 * rejected)


def test_the_command_line_has_every_loss_that_records_can_feed():
    of_log_probs = {
        row.name for row in TABLE if any(name.endswith("logps") for name in row.reads)
    }
    of_rewards = {"bradley_terry", "margin_bradley_terry", "scaled_bradley_terry"}
    of_rewards |= {"rao_kupper", "davidson", "reward_regression"}
    of_rewards |= {"attribute_regression", "general_preference"}
    of_answers = {"kto", "bco", "apo_zero_unpaired"}
    of_lists = {"plackett_luce", "lipo_lambda", "irpo"}
    of_tokens = {"align_distil", "sparse_po"}
    found = of_log_probs | of_rewards | of_answers | of_lists | of_tokens
    assert set(LOSSES) == found


@pytest.mark.parametrize(
    ("options", "named"),
    [({"drop_rate": 1.0}, "drop_rate 1.0"), ({"momentum": -1}, "momentum -1")],
)
def test_options_of_beta_dpo_are_checked(options, named):
    with pytest.raises(InputError, match=named):
        beta_dpo(**options)
    with pytest.raises(InputError, match="beta > 0"):
        beta_dpo(beta=0.0)


def test_the_state_keeps_its_dtypes_under_wider_scores(pairs):  # noqa: F811
    """Or it would not come back from a checkpoint."""
    objective = beta_dpo()
    with jax.enable_x64(True):
        grad, after, _ = one_weight_step(objective, few_pairs(pairs, 4), jnp.float64)
    assert grad.dtype == jnp.float64 and after["running_mean"] != 0
    dtypes = lambda state: {name: value.dtype for name, value in state.items()}
    assert dtypes(after) == dtypes(objective.init(0))


@pytest.mark.parametrize(("count", "drop_rate"), [(1, 0.2), (2, 0.9)])
def test_beta_dpo_leaves_no_batch_empty(pairs, count, drop_rate):  # noqa: F811
    objective = beta_dpo(drop_rate=drop_rate)
    grad, _, metrics = one_weight_step(objective, few_pairs(pairs, count))
    assert metrics["loss"] > 0 and grad != 0


def test_beta_dpo_leaves_pairs_out_and_moves_its_moments(pairs):  # noqa: F811
    objective = beta_dpo(beta=0.5, drop_rate=0.5)
    model = build(tiny_config())
    scorer = make_scorer(model, objective.scores, chunk_size=4)
    score = lambda params, micro: scorer(params, {}, micro)
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    batch = next(padded_batches(pairs, batch_size=8, reference=zeros))
    batch = jax.tree.map(jnp.asarray, batch)
    params, state = tiny_params(model), objective.init(0)
    find = jax.jit(functools.partial(gradient, objective, score))
    _, after, metrics = find(params, batch, state)
    logps = score(params, jax.tree.map(lambda x: x[0], batch)).scores["policy_logps"][
        :, 0
    ]
    margins = np.asarray(logps[:, 0] - logps[:, 1], float)
    assert int(after["batches"]) == 1
    np.testing.assert_allclose(after["running_mean"], 0.1 * margins.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        after["running_std"], 0.1 * margins.std(ddof=1), rtol=1e-4
    )
    # The loss is the mean over four of the eight pairs, at one beta for all of them.
    found = float(metrics["loss"])
    candidates = []
    for chosen in range(2**8):
        mask = np.array([chosen >> i & 1 for i in range(8)], bool)
        if mask.sum() == 4:
            usual = 0.1 * margins.mean()
            beta = max(1e-3, 0.5 * (1 + 0.6 * (margins[mask].mean() - usual)))
            candidates.append(np.log1p(np.exp(-beta * margins[mask])).mean())
    assert np.abs(np.array(candidates) - found).min() < 1e-5


def with_scalar(loss, weight):
    """The objective of a loss and, per micro-batch, weight mean(w^2 |y|) / 2."""

    def scalar(inputs, state):
        return weight * jnp.mean(inputs.scores["squares"]) / 2

    return dataclasses.replace(from_loss(loss, beta=0.5), scalar=scalar)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss", [losses.dpo, losses.dr_dpo], ids=["dpo", "dr_dpo"])
def test_a_scalar_term_adds_its_mean_over_micro_batches(pairs, loss, accumulation):  # noqa: F811
    """Of weights w, log-probabilities w |y|; micro-batches of 1 to 2 pairs."""
    batch = few_pairs(pairs, 8, accumulation=accumulation)
    if accumulation > 1:  # the first micro-batch has one pair
        empty = {"pair_index": -1, "weights": 0}
        blank = {n: getattr(batch, n).at[0, 1].set(x) for n, x in empty.items()}
        batch = dataclasses.replace(batch, **blank)

    def score(w, micro):
        lengths = jnp.asarray(micro.completion_lengths, jnp.float32)
        squares = jnp.sum(w**2 * lengths)
        return Scored({"policy_logps": w * lengths, "squares": squares}, {})

    find = lambda objective: jax.jit(functools.partial(gradient, objective, score))
    plain, both = (
        find(objective)(jnp.float32(-1), batch, {})
        for objective in (from_loss(loss, beta=0.5), with_scalar(loss, 0.25))
    )
    tokens = np.asarray(batch.completion_lengths, float).sum((1, 2, 3))
    counts = np.asarray(batch.pair_index >= 0).sum((1, 2))
    mean = (tokens * counts).sum() / counts.sum()
    # d/dw of weight w^2 mean / 2 at w = -1, and its value.
    assert float(both[0] - plain[0]) == pytest.approx(-0.25 * mean, rel=1e-5)
    added = both[2]["loss"] - plain[2]["loss"]
    assert float(added) == pytest.approx(0.125 * mean, rel=1e-5)
