"""`--objective auto`: no correction without evidence, and then the right one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.noise import candidates
from jaxpref.objectives import auto, from_loss
from tests.tiny import step_on_margins

UNIT = functools.partial(losses.dpo, beta=1.0)
# Without features, all coefficients are rates.
RATES = auto(UNIT, length=0.0, memory=512, warmup=8)


def batch_of(values, empty=np.nan):
    """A batch of 64, mostly empty: one shape for all, which is compiled once."""
    return np.concatenate([values, np.full(64 - len(values), empty)])


def test_before_any_evidence_it_is_the_loss_itself():
    real = np.array([-30.0, -2.0, 0.0, 0.5, 20.0])
    gradient, state, metrics = step_on_margins(RATES, batch_of(real), RATES.init(2))
    # d/dw of the mean of -log s(w z) at w = 1.
    assert float(gradient) == pytest.approx(np.mean(-real * expit(-real)), rel=1e-6)
    assert metrics["noise/model"] == 0 and metrics["noise/flip_rate"] < 1e-8
    assert state["seen"]["count"] == 5 and not state["seen"]["labels"].where.any()


def test_it_learns_whose_labels_are_wrong():
    """Two annotators with rates of 0 and 40%, in batches of 64."""
    rng = np.random.default_rng(0)
    _, state, _ = step_on_margins(
        RATES, batch_of(np.ones(8)), RATES.init(2), first_pair=9999
    )
    for n in range(8):
        z, who = rng.normal(0, 4, 64), rng.integers(0, 2, 64)
        right = np.where(rng.random(64) < expit(z), 1, -1)
        wrong = (who == 1) & (rng.random(64) < 0.4)
        z = z * np.where(wrong, -right, right)
        _, state, metrics = step_on_margins(RATES, z, state, who, first_pair=64 * n)
    assert candidates.NAMES[int(metrics["noise/model"])] == "annotators"
    odds = [float(metrics[f"noise/log_odds_{name}"]) for name in candidates.NAMES[1:]]
    assert odds[1] == max(odds) > 5
    assert float(metrics["noise/flip_rate"]) == pytest.approx(0.2, abs=0.06)
    own = jax.tree.map(lambda x: x[2], state["coefficients"])
    rates = expit(np.asarray(own.common[-1] + own.own[:2, 0]))
    np.testing.assert_allclose(rates, [0, 0.4], atol=0.1)
    # The gradient is that of the likelihood with each annotator's rate.
    z, who = np.array([-3.0, 2.0, 0.5, -1.0]), np.array([0, 1, 1, 0])
    gradient, again, _ = step_on_margins(
        RATES, batch_of(z), state, batch_of(who, -1).astype(int), first_pair=9999
    )
    e = rates[who]
    p = (1 - e) * expit(z) + e * expit(-z)
    expected = np.mean(-(1 - 2 * e) * expit(z) * expit(-z) * z / p)
    assert float(gradient) == pytest.approx(expected, rel=1e-4)
    # The first pairs have returned: the policy has seen these labels.
    jax.tree.map(
        np.testing.assert_array_equal, again["seen"]["labels"], state["seen"]["labels"]
    )


def test_with_one_flip_rate_it_is_the_loss_of_shrunken_margins():
    state, one = RATES.init(2), candidates.NAMES.index("one_rate")
    now = state["coefficients"]
    scales = now.common.at[0, 0].set(np.log(0.3)).at[one, 0].set(np.log(1.2))
    state["coefficients"] = dataclasses.replace(now, common=scales)
    state["log_odds"] = state["log_odds"].at[one].set(1.0)
    z, c = np.array([-30.0, -2.0, 0.0, 0.5, 20.0]), 0.3 / 1.2
    gradient, _, metrics = step_on_margins(RATES, batch_of(z), state)
    assert metrics["noise/model"] == one
    assert float(metrics["noise/shrinkage"]) == pytest.approx(c, rel=1e-5)
    # d/dw of the mean of -log s(c w z) / c at w = 1.
    assert float(gradient) == pytest.approx(np.mean(-z * expit(-c * z)), rel=1e-5)


def test_a_length_that_all_annotators_follow_is_not_corrected():
    """It may be a preference, so the loss is that of correct labels."""
    objective = auto(UNIT, memory=512, warmup=8)
    state = objective.init(2)
    state["log_odds"] = jnp.array([0.0, -1.0, 30.0, 60.0, 58.0])
    z = np.array([-3.0, -2.0, 0.0, 0.5, 2.0])
    gradient, _, metrics = step_on_margins(objective, batch_of(z), state)
    assert metrics["noise/model"] == 0
    assert metrics["noise/log_odds_features"] == 60
    # d/dw of the mean of -log s(w z) at w = 1.
    assert float(gradient) == pytest.approx(np.mean(-z * expit(-z)), rel=1e-6)


def test_it_reads_only_what_its_features_need():
    assert auto(UNIT, length=0.0).reads == from_loss(losses.dpo).reads
    assert "chosen_lengths" in auto(UNIT).reads
    assert auto(UNIT, position=1.0).numbers == {"chosen_first"}
    assert auto(UNIT, predictor=1.0).numbers == {"flip_predictor"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": -1.0}, "auto: Expected standard deviations > 0"),
        ({"annotators": -1.0}, "auto: Expected annotators >= 0"),
        ({"preference": -1.0}, "auto: Expected preference >= 0"),
        ({"memory": 0}, "auto: memory 0: must be from 1 to 1,000,000"),
        ({"warmup": -1}, "auto: warmup -1: must be 0 or more"),
        ({"loss": losses.dr_dpo}, "couples the pairs"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        auto(**{"loss": losses.dpo} | options)
