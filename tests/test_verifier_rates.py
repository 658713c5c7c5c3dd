"""Error rates of a verifier that differ between prompts: the expected gradient."""

import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import objectives
from jaxpref.cli.objectives import choose
from jaxpref.errors import InputError
from jaxpref.objectives import PER_RECORD
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.sampled import POLICY, SAMPLER
from jaxpref.online.rates import rates_of
from tests.batches import batch_of_owners

RIGHT = np.array([[1, 0, 0], [0, 1, 1]])
"""Which of the three answers, of a token each, are right, of two prompts."""
E0, E1 = np.array([0.4, 0.05]), np.array([0.1, 0.5])
"""How often the verifier errs on wrong and on right answers to each prompt."""
LOGITS = np.array([[0.3, -0.2, 0.5], [-0.4, 0.1, 0.8]])
ANSWERS = 2


def groups():
    """Every group of answers with every outcome of the verifier, for both prompts.

    Prompts [G], answers [G, K], rewards [G, K], and the probability of these rewards.
    """
    pairs = list(itertools.product(range(3), repeat=ANSWERS))
    outcomes = list(itertools.product((0.0, 1.0), repeat=ANSWERS))
    every = list(itertools.product(range(2), pairs, outcomes))
    prompts = np.array([x[0] for x in every])
    answers, rewards = (np.array([x[n] for x in every]) for n in (1, 2))
    right = RIGHT[prompts[:, None], answers]
    accepted = np.where(right, 1 - E1[prompts, None], E0[prompts, None])
    likely = np.where(rewards == 1, accepted, 1 - accepted).prod(1)
    return prompts, answers, rewards, likely


def expected_gradient(objective):
    """That of the losses, over all groups and outcomes, by enumeration."""
    prompts, answers, rewards, likely = groups()
    slots = (1, len(prompts), 1)
    owners = np.broadcast_to(np.arange(ANSWERS, dtype=np.int32), (*slots, ANSWERS))
    numbers = {
        "sampled_rewards": rewards.reshape(*slots, ANSWERS),
        "false_positive_rate": E0[prompts].reshape(slots),
        "false_negative_rate": E1[prompts].reshape(slots),
    }

    def total(logits):
        logps = jax.nn.log_softmax(logits)[prompts[:, None], answers]
        sampler = jax.lax.stop_gradient(logps)
        batch = batch_of_owners(
            np.ascontiguousarray(owners),
            np.ones((*slots, ANSWERS), np.int32),
            numbers=numbers,
        )
        shaped = lambda x: jnp.reshape(x, owners.shape)
        batch.token_numbers[SAMPLER] = shaped(sampler)
        inputs = Inputs({POLICY: shaped(logps)}, batch)
        losses = objective.losses(inputs, objective.init(0))
        probability = jnp.exp(jnp.sum(sampler, -1)) * likely
        return jnp.sum(probability * jnp.reshape(losses, -1))

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(total))(jnp.asarray(LOGITS)))


def clean_gradient():
    """Minus the gradient of the share of right answers, p * (right - share)."""
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    return -p * (RIGHT - (p * RIGHT).sum(1, keepdims=True))


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


RATES = {"false_positive_rate": PER_RECORD, "false_negative_rate": PER_RECORD}


@pytest.mark.parametrize("make", [objectives.rloo, objectives.reinforce])
def test_the_expected_gradient_is_that_of_the_right_rewards(make):
    """Without the rates, prompts with a worse verifier count less.

    Each prompt's gradient is then shrunk by its own 1 - e0 - e1.
    """
    corrected = make(beta=0.0, **RATES)
    assert corrected.numbers >= {"false_positive_rate", "false_negative_rate"}
    clean = clean_gradient()
    found = expected_gradient(corrected)
    np.testing.assert_allclose(found, clean, rtol=1e-6, atol=1e-9)
    ignored = expected_gradient(make(beta=0.0))
    shrunk = (1 - E0 - E1)[:, None] * clean
    np.testing.assert_allclose(ignored, shrunk, rtol=1e-6, atol=1e-9)
    # One number for all prompts only changes the scale.
    common = {"false_positive_rate": 0.2, "false_negative_rate": 0.3}
    one = expected_gradient(make(beta=0.0, **common))
    np.testing.assert_allclose(one, shrunk / 0.5, rtol=1e-6, atol=1e-9)
    assert cosine(one, clean) < 0.999 < cosine(found, clean)


def test_one_rate_of_all_prompts_and_one_of_each():
    made = objectives.rloo(beta=0.0, false_negative_rate=PER_RECORD)
    assert "false_positive_rate" not in made.numbers
    with pytest.raises(InputError, match="rloo: .*below 1, got 1"):
        objectives.rloo(false_positive_rate=0.5, false_negative_rate=0.5)


def test_rates_of_the_records():
    prompt: Any = lambda n, **record: types.SimpleNamespace(
        source_record=record, place=f"p.jsonl row {n}"
    )
    config: Any = types.SimpleNamespace(
        objective=objectives.rloo(
            false_positive_rate=PER_RECORD, false_negative_rate=0.5
        ),
        options=types.SimpleNamespace(
            named_columns={"false_positive_rate": "v.e0", "weight": "w"}
        ),
    )
    good = prompt(1, v={"e0": 0.25})
    assert rates_of([good], config) == [{"false_positive_rate": 0.25}]
    for bad, message in (
        (
            {"e0": 0.5},
            r"row 2: the rates .* below 1, but they are 0.5 \(field 'v.e0'\) and 0.5 "
            r"\(--objective.false-negative-rate\); correct them",
        ),
        ({"e0": -0.1}, r"row 2: the rates .* 0 or more, .* are -0.1 \(field 'v.e0'\)"),
        ({"e0": "x"}, "row 2: field 'v.e0' must be a number"),
        ({}, "row 2: no field 'v.e0' for false_positive_rate"),
    ):
        with pytest.raises(InputError, match=message):
            rates_of([good, prompt(2, v=bad)], config)


def test_the_command_names_them():
    given = {"objective": ["rloo"], "columns": ["false_positive_rate=e0"]}
    choice, _ = choose(given)
    assert choice.per_record == {"false_positive_rate"}
    both = given | {"objective.false-positive-rate": ["0.1"]}
    with pytest.raises(InputError, match="--objective.false-positive-rate 0.1: --col"):
        choose(both)
    for objective, name, message in (
        ("grpo", "false_positive_rate", "e0: only reinforce and rloo read it"),
        ("rloo", "weight", "e0: rloo has no weight"),
    ):
        other = {"objective": [objective], "columns": [f"{name}=e0"]}
        with pytest.raises(InputError, match=message):
            choose(other)
