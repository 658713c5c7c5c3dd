"""Objectives with a flip rate for each pair, and weights of pairs: what they read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxpref import data, losses
from jaxpref.data import DataOptions, InjectOptions, ListSource
from jaxpref.data.noise import flip_pairs
from jaxpref.errors import InputError
from jaxpref.noise.instance import Coefficients
from jaxpref.objectives import from_loss, instance_noise
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import weighted_losses
from jaxpref.train import TrainConfig
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs
from tests.tiny import padded_batches

UNIT = functools.partial(losses.dpo, beta=1.0)
EVERY = dict(length=2.0, likelihood=1.0, position=1.0, predictor=1.0)
COUNT = 12


def records():
    rng = np.random.default_rng(0)
    return [
        row
        | {
            "chosen": row["chosen"] + "!" * (7 * n % 5),
            "annotator": f"annotator {n % 3}",
            "hard": round(float(rng.normal()), 3),
            "first": bool(n % 2),
            "w": n % 4,
        }
        for n, row in enumerate(synthetic_pairs(COUNT))
    ]


def pairs_of(inject=None, **fields):
    options = DataOptions(
        columns=tuple(f"{name}={field}" for name, field in fields.items()),
        heldout_fraction=0.0,
        inject=inject or InjectOptions(),
    )
    return data.make_splits(ListSource(records()), byte_tokenizer(), options).train


ALL = pairs_of(flip_predictor="hard", chosen_first="first", weight="w")


def inputs_of(pairs, **layout):
    """A batch of all pairs with random scores, and these by pair [N, K]."""
    rng = np.random.default_rng(1)
    reference = rng.normal(-20, 4, (len(pairs), 2)).astype(np.float32)
    stored = {"reference_logps": reference}
    sizes = {"batch_size": len(pairs)} | layout
    batch = next(padded_batches(pairs, reference=stored, **sizes))
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    policy = reference + rng.normal(0, 1.5, reference.shape).astype(np.float32)
    index = np.asarray(batch.pair_index)
    scores = {"policy_logps": jnp.asarray(policy[index])}
    order = index[:, 0]
    margins = (policy - reference) @ [1, -1]
    return Inputs(scores, batch), order, margins[order], reference[order]


def features_of(pairs, order, reference):
    """The odd and even features, from the records."""
    lengths = pairs.completion_lengths[order].astype(float)
    per_token = (reference / lengths) @ [1, -1]
    rows = [records()[n] for n in order]
    odd = [
        np.tanh(2 * np.log(lengths[:, 0] / lengths[:, 1])),
        np.tanh(per_token),
        [1 if row["first"] else -1 for row in rows],
    ]
    return np.stack(odd, 1), np.array([[row["hard"]] for row in rows])


def test_the_loss_is_that_of_the_features():
    """All of them, with an annotator's own coefficients; gradients pass the margin."""
    objective = instance_noise(UNIT, **EVERY, largest=0.6)
    inputs, order, z, reference = inputs_of(ALL)
    odd, even = features_of(ALL, order, reference)
    rng = np.random.default_rng(2)
    common, own = rng.normal(0, 0.5, 6), rng.normal(0, 0.5, (4, 5))
    state = {"coefficients": Coefficients(jnp.float32(common), jnp.float32(own))}
    weights = common[1:] + own[ALL.columns["annotator"][order]]
    one = np.ones((COUNT, 1))
    rate = lambda odd: 0.6 * expit(np.sum(weights * np.hstack([one, even, odd]), 1))
    e, swapped = rate(odd), rate(-odd)
    p = (1 - e) * expit(z) + swapped * expit(-z)
    found = objective.losses(inputs, state)[:, 0]
    np.testing.assert_allclose(found, -np.log(p), rtol=2e-5)

    def total(policy):
        scores = {"policy_logps": policy}
        return jnp.sum(objective.losses(Inputs(scores, inputs.batch), state))

    slope = -(1 - e - swapped) * expit(z) * expit(-z) / p
    found = jax.grad(total)(inputs.scores["policy_logps"])[:, 0]
    np.testing.assert_allclose(found, np.stack([slope, -slope], 1), rtol=1e-4)


def test_what_is_learned_from_a_batch():
    """The labels are remembered with their features, and the coefficients move."""
    objective = instance_noise(UNIT, **EVERY, memory=16, warmup=COUNT)
    inputs, order, z, reference = inputs_of(ALL)
    learn = jax.jit(lambda *parts: objective.learn(Inputs(*parts[:2]), parts[2]))
    warm, _ = learn(inputs.scores, inputs.batch, objective.init(3))
    seen = warm["seen"]
    assert not seen["labels"].where.any() and seen["count"] == COUNT
    jax.tree.map(
        np.testing.assert_array_equal,
        warm["coefficients"],
        objective.init(3)["coefficients"],
    )
    pair_index = inputs.batch.pair_index + COUNT
    others = dataclasses.replace(inputs.batch, pair_index=pair_index)
    state, metrics = learn(inputs.scores, others, warm)
    labels = state["seen"]["labels"]
    odd, even = features_of(ALL, order, reference)
    assert np.asarray(labels.where).tolist() == [True] * COUNT + [False] * 4
    np.testing.assert_allclose(labels.margins[:COUNT], z, rtol=1e-5)
    np.testing.assert_allclose(labels.features.odd[:COUNT], odd, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(labels.features.even[:COUNT], even, rtol=1e-6)
    assert (
        labels.annotators[:COUNT].tolist() == ALL.columns["annotator"][order].tolist()
    )
    before, after = objective.init(3)["coefficients"], state["coefficients"]
    assert (np.abs(after.common - before.common) > 1e-5).all()
    # The metrics describe the state before the batch: the prior.
    assert metrics["noise/coefficient_constant"] == pytest.approx(np.log(0.1 / 0.4))
    names = ("constant", "predictor", "length", "likelihood", "position")
    for name in names:
        assert metrics[f"noise/information_{name}"] == pytest.approx(0, abs=1e-5)
        assert (f"noise/coefficient_{name}" in metrics) and not metrics[
            "noise/identified"
        ]
    right = 0.9 * expit(z) / (0.9 * expit(z) + 0.1 * expit(-z))
    assert metrics["noise/posterior"] == pytest.approx(right.mean(), rel=1e-5)
    # In the second pass, the policy has seen the labels.
    again, _ = learn(inputs.scores, inputs.batch, state)
    jax.tree.map(np.testing.assert_array_equal, again["seen"]["labels"], labels)


def test_features_that_are_left_out_are_not_read():
    reads = instance_noise(UNIT, length=0.0).reads
    assert reads == from_loss(losses.dpo).reads
    assert instance_noise(UNIT, position=1.0).numbers == {"chosen_first"}
    assert instance_noise(UNIT, predictor=1.0).numbers == {"flip_predictor"}
    simpo = instance_noise(losses.simpo, likelihood=1.0)
    assert "reference_logps" in simpo.scores
    with pytest.raises(InputError, match="likelihood: bradley_terry trains a reward"):
        instance_noise(losses.bradley_terry, likelihood=1.0)


def test_weights_multiply_the_loss_of_training_pairs():
    inputs, order, z, _ = inputs_of(ALL, batch_size=16)
    weights = np.asarray(inputs.batch.weights)[:, 0]
    real = order >= 0
    np.testing.assert_array_equal(weights[real], order[real] % 4)
    assert (weights[~real] == 0).all() and "weight" not in inputs.batch.numbers
    found = weighted_losses(from_loss(losses.dpo, beta=1.0), inputs, {})[:, 0]
    expected = (order % 4) * np.logaddexp(0, -z)
    np.testing.assert_allclose(found[real], expected[real], rtol=2e-5)
    assert ALL.digest() != pairs_of().digest()
    config = dict(model="m", data="d", out="o", objective=from_loss(losses.dpo))
    options = DataOptions(columns=("weight=w",))
    assert TrainConfig(**config, options=options).options.columns == ("weight=w",)


def test_a_flip_exchanges_the_position_and_nothing_else():
    flipped = pairs_of(
        InjectOptions(flip_rate=1.0),
        **dict(flip_predictor="hard", chosen_first="first", weight="w"),
    )
    for pairs in (flipped, flip_pairs(ALL, np.ones(COUNT, bool))):
        first = pairs.columns["chosen_first"]
        np.testing.assert_array_equal(first, 1 - ALL.columns["chosen_first"])
        for name in ("flip_predictor", "weight"):
            np.testing.assert_array_equal(pairs.columns[name], ALL.columns[name])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 0.5}, "rate between 0 and 0.5, got 0.5"),
        ({"largest": 1.5}, "largest in"),
        ({"spread": 0.0}, "standard deviations > 0"),
        ({"length": -1.0}, "standard deviations > 0"),
        ({"annotators": -1.0}, "annotators >= 0"),
        ({"memory": 0}, "memory 0: must be from 1 to 1,000,000"),
        ({"warmup": -1}, "warmup -1: must be 0 or more"),
        ({"loss": losses.dr_dpo}, "couples the pairs"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        instance_noise(**{"loss": losses.dpo} | options)


def test_a_record_without_the_fields(tmp_path):
    config = dict(model="m", data="d", out=str(tmp_path))
    objective = instance_noise(losses.dpo, position=1.0)
    with pytest.raises(InputError, match="--columns chosen_first=FIELD"):
        TrainConfig(**config, objective=objective)
    for field, value, message in (
        ("first", "yes", "field 'first' must be a number"),
        ("w", -1, "field 'w' must be 0 or more for weight"),
    ):
        name = {"first": "chosen_first", "w": "weight"}[field]
        rows = [records()[0] | {field: value}]
        options = DataOptions(columns=(f"{name}={field}",))
        with pytest.raises(InputError, match=f"row 1: {message}"):
            data.make_splits(ListSource(rows), byte_tokenizer(), options)
