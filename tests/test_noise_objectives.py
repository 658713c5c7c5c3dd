"""Objectives that learn the noise: known limits, layouts, and what they remember."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.noise import running
from jaxpref.objectives import (
    auto,
    crm,
    em,
    em_weighted,
    from_loss,
    instance_noise,
    learned_rate,
    re_po,
)
from jaxpref.objectives.inputs import Inputs
from tests.test_training import few_steps, pairs  # noqa: F401
from tests.tiny import padded_batches, step_on_margins

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


@pytest.mark.parametrize(
    "make",
    [
        em,
        functools.partial(instance_noise, warmup=0),
        pytest.param(functools.partial(auto, warmup=0), marks=pytest.mark.slow),
        learned_rate,
        re_po,
    ],
    ids=["em", "instance_noise", "auto", "learned_rate", "re_po"],
)
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


def test_the_gradient_is_that_derived_by_hand():
    """A label counts as right with the posterior probability, held constant."""
    margins = np.array([2.0, -1.0, 0.5, np.nan])
    real = margins[:3]
    right = expit(real + logit(0.9))
    expected = np.mean(real * ((1 - right) * expit(real) - right * expit(-real)))
    for objective in (re_po(UNIT), em_weighted(UNIT)):
        found, _, _ = step_on_margins(objective, margins, objective.init(0))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_reliabilities_are_the_papers():
    """Known annotators, an unknown one, an absent one, and a padding row."""
    margins = np.array([2.0, -1.0, 0.5, 3.0, np.nan])
    annotators = np.array([0, 0, 2, -1, 1])
    right = expit(margins + logit(0.9))
    objective = re_po(UNIT)
    _, state, metrics = step_on_margins(
        objective, margins, objective.init(3), annotators
    )
    expected = [
        0.9 * 0.9 + 0.1 * right[:2].mean(),
        0.9,
        0.9 * 0.9 + 0.1 * right[2],
        0.9 * 0.9 + 0.1 * right[3],
    ]
    np.testing.assert_allclose(state["reliability"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["noise/posterior"], right[:4].mean(), rtol=1e-6)
    objective = em(UNIT)
    _, state, _ = step_on_margins(objective, margins, objective.init(3), annotators)
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
    """Counting ends when one of the first 64 pairs returns."""
    rng = np.random.default_rng(0)
    batches = [np.abs(rng.normal(0, 4, 400)) for _ in range(3)]
    batches = [np.where(rng.random(400) < 0.3, -z, z) for z in batches]
    objective = learned_rate(UNIT)
    counts, state = running.no_counts(), objective.init(0)
    for n, z in enumerate(batches):
        before = running.posterior(counts)
        counts = running.count(counts, jnp.asarray(z, jnp.float32))
        _, state, metrics = step_on_margins(objective, z, state, first_pair=400 * n)
    after = running.posterior(counts)
    np.testing.assert_allclose(state["pooled"].rate, after.rate, rtol=1e-5)
    # Metrics are of the state that the step began with.
    shown = [metrics[f"noise/{name}"] for name in ("flip_rate", "temperature")]
    np.testing.assert_allclose(shown, [before.rate, before.temperature], rtol=1e-5)
    assert metrics["noise/flip_rate_lower"] < metrics["noise/flip_rate_upper"]
    for first_pair in (390, 1200):  # neither holds one of the first 64 pairs
        _, again, _ = step_on_margins(
            objective, batches[0], state, first_pair=first_pair
        )
        assert again["counts"].labels == 1600 and not again["first_pass"]["ended"]
    for first_pair in (60, 1200):
        _, state, _ = step_on_margins(
            objective, batches[0], state, first_pair=first_pair
        )
        assert state["counts"].labels == 1200 and state["first_pass"]["ended"]


def test_every_annotator_has_its_learned_rate():
    """The gradient in z is (2 e - 1) s(z) s(-z) / P; unknown: the rate of all."""
    margins, annotators = np.array([2.0, -1.0, 0.5, np.nan]), [0, 1, -1, 0]
    objective = learned_rate(UNIT)
    state = objective.init(2)
    rates = jnp.array([0.1, 0.4])
    state["annotators"] = dataclasses.replace(state["annotators"], rate=rates)
    z, e = margins[:3], np.array([0.1, 0.4, 0.25])
    p = (1 - e) * expit(z) + e * expit(-z)
    expected = np.mean(z * (2 * e - 1) * expit(z) * expit(-z) / p)
    found, state, metrics = step_on_margins(objective, margins, state, annotators)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert state["annotator_counts"].sum((1, 2)).tolist() == [1, 1]
    assert metrics["noise/annotator_spread"] > 0
    # A checkpoint cannot hold empty arrays.
    assert all(leaf.size for leaf in jax.tree.leaves(objective.init(0)))


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
