"""Objectives that learn the noise: known limits, layouts, and what they remember."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.noise import running
from jaxpref.objectives import crm, em, em_weighted, from_loss, learned_rate, re_po
from jaxpref.objectives.inputs import Inputs
from jaxpref.train.gradient import gradient
from tests.test_training import few_steps, pairs  # noqa: F401
from tests.tiny import padded_batches

DPO = functools.partial(losses.dpo, beta=0.5)
UNIT = functools.partial(losses.dpo, beta=1.0)


def test_reliability_one_is_the_base_loss(pairs):  # noqa: F811
    base, _ = few_steps(pairs, objective=from_loss(losses.dpo, beta=0.5))
    sure = em(DPO, prior_right=1e9, prior_wrong=1e-6)
    found, _ = few_steps(pairs, objective=sure)
    np.testing.assert_allclose(found, base, rtol=1e-4)


def test_first_step_is_conservative_dpo(pairs):  # noqa: F811
    """At margin 0 the posterior is the reliability: cDPO at its flip rate."""
    cdpo, _ = few_steps(
        pairs, objective=from_loss(losses.cdpo, beta=0.5, flip_rate=0.1), steps=1
    )
    for objective in (em(DPO), re_po(DPO)):
        found, _ = few_steps(pairs, objective=objective, steps=1)
        np.testing.assert_allclose(found, cdpo, rtol=1e-5)


@pytest.mark.parametrize("make", [em, learned_rate, re_po])
def test_layout_does_not_change_what_is_learnt(pairs, make):  # noqa: F811
    objective = make(DPO)
    whole, _ = few_steps(pairs, objective=objective)
    split, _ = few_steps(pairs, objective=objective, sizes=(2, 2, 2), accumulation=2)
    np.testing.assert_allclose(split, whole, rtol=1e-4)


def test_both_readings_agree_for_dpo_and_differ_for_ipo(pairs):  # noqa: F811
    def two(loss):
        return [
            few_steps(pairs, objective=make(loss))[0][:, 1]
            for make in (em, em_weighted)
        ]

    likelihood, weighted = two(DPO)
    np.testing.assert_allclose(likelihood, weighted, rtol=1e-4)
    likelihood, weighted = two(functools.partial(losses.ipo, beta=0.5))
    assert not np.allclose(likelihood, weighted, rtol=1e-2)


def state_after(objective, margins, annotators, num_annotators, state=None):
    """The objective's state after one batch of given margins."""
    from jaxpref.data.batch import PreferenceBatch

    shape = (1, len(margins), 1)
    blank = np.zeros((*shape, 0), np.int32)
    batch = PreferenceBatch(
        tokens=blank,
        lengths=np.zeros(shape, np.int32),
        predictors=blank,
        targets=blank,
        completions=blank,
        pair_index=np.where(np.isnan(margins), -1, np.arange(len(margins))).reshape(
            shape
        ),
        completion_lengths=np.ones((*shape, 2), np.int32),
        reference={"reference_logps": np.zeros((*shape, 2), np.float32)},
        is_flipped=np.zeros(shape, bool),
        annotator=np.reshape(annotators, shape),
        empty_trace=np.zeros(shape, bool),
        weights=np.ones(shape, np.float32),
    )
    batch = jax.tree.map(jax.numpy.asarray, batch)
    logps = np.stack([np.nan_to_num(margins), np.zeros(len(margins))], -1)
    logps = jax.numpy.asarray(logps.reshape(-1, 1, 2), jax.numpy.float32)
    score = lambda w, micro: {"policy_logps": w * logps}
    _, state, metrics = gradient(
        objective,
        score,
        jax.numpy.float32(1.0),
        batch,
        objective.init(num_annotators) if state is None else state,
    )
    return state, metrics


def test_reliabilities_are_the_papers():
    """Known annotators, an unknown one, an absent one, and a padding row."""
    margins = np.array([2.0, -1.0, 0.5, 3.0, np.nan])
    annotators = np.array([0, 0, 2, -1, 1])
    right = expit(margins + logit(0.9))
    state, metrics = state_after(re_po(UNIT), margins, annotators, 3)
    expected = [
        0.9 * 0.9 + 0.1 * right[:2].mean(),
        0.9,
        0.9 * 0.9 + 0.1 * right[2],
        0.9 * 0.9 + 0.1 * right[3],
    ]
    np.testing.assert_allclose(state["reliability"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["noise/posterior"], right[:4].mean(), rtol=1e-6)
    state, _ = state_after(em(UNIT), margins, annotators, 3)
    expected = [
        (9 + right[:2].sum()) / 12,
        0.9,
        (9 + right[2]) / 11,
        (9 + right[3]) / 11,
    ]
    np.testing.assert_allclose(state["reliability"], expected, rtol=1e-6)


def test_learned_rate_begins_as_forward_dpo_at_one_quarter(pairs):  # noqa: F811
    forward = from_loss(losses.forward_dpo, beta=0.5, flip_rate=0.25)
    base, _ = few_steps(pairs, objective=forward, steps=1)
    found, _ = few_steps(pairs, objective=learned_rate(DPO), steps=1)
    np.testing.assert_allclose(found, base, rtol=1e-4)


def test_learned_rate_is_that_of_the_margins_seen():
    """Whatever was padded, and old batches fade."""
    rng = np.random.default_rng(0)
    batches = [np.abs(rng.normal(0, 4, 400)) for _ in range(3)]
    batches = [np.where(rng.random(400) < 0.3, -z, z) for z in batches]
    objective = learned_rate(UNIT, memory=1000.0)
    counts, state = running.no_counts(), None
    for z in batches:
        before = running.posterior(counts)
        counts = running.count(counts, jnp.asarray(z, jnp.float32), memory=1000.0)
        state, metrics = state_after(objective, z, np.full(400, -1), 0, state=state)
    after = running.posterior(counts)
    np.testing.assert_allclose(running.posterior(state).rate, after.rate, rtol=1e-5)
    # Metrics are of the state that the step began with.
    shown = [metrics[f"noise/{name}"] for name in ("flip_rate", "temperature")]
    np.testing.assert_allclose(shown, [before.rate, before.temperature], rtol=1e-5)
    assert metrics["noise/flip_rate_lower"] < metrics["noise/flip_rate_upper"]


@pytest.mark.parametrize(
    "make",
    [em, em_weighted, re_po, learned_rate, functools.partial(crm, noise_rate=0.2)],
    ids=["em", "em_weighted", "re_po", "learned_rate", "crm"],
)
def test_losses_of_a_token_have_rewards_of_a_token(pairs, make):  # noqa: F811
    """Whatever wraps them: the metrics look at the loss as it is."""
    objective = make(functools.partial(losses.simpo, beta=2.0, gamma=0.5))
    batch = next(padded_batches(pairs, batch_size=8))
    batch = jax.tree.map(jnp.asarray, batch)
    scores = {"policy_logps": -3.0 * batch.completion_lengths}
    if objective.num_models == 2:
        scores = {"one": scores, "two": scores}
    found = objective.metrics(Inputs(scores, batch))
    assert found["rewards/chosen"] == pytest.approx(-6.0)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (em, {"prior_right": 0.0}, "prior_right 0.0"),
        (em, {"memory": 0}, "memory 0"),
        (re_po, {"reliability": 1.0}, "reliability 1.0"),
        (re_po, {"momentum": 1.0}, "momentum 1.0"),
        (learned_rate, {"memory": 0}, "memory 0"),
        (em, {"loss": functools.partial(losses.dpo, beta=-1.0)}, "beta > 0"),
        (em, {"loss": functools.partial(losses.dpo, gamma=1.0)}, "gamma"),
    ],
)
def test_wrong_options_are_named(make, options, named):
    with pytest.raises(InputError, match=named):
        make(**{"loss": losses.dpo} | options)


def test_losses_of_the_whole_batch_are_refused():
    with pytest.raises(InputError, match="couples the pairs"):
        em(losses.dr_dpo)
