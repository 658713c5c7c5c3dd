"""Likelihood beside preference, and sums of losses; the battery is elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit

from jaxpref import losses
from tests.losses.arrays import PAIRS, arrays_of
from tests.losses.rows_likelihood import ROWS
from tests.losses.test_battery import on_device

RPO = next(row for row in ROWS if row.loss is losses.rpo)


def mpo(*logps):
    """0.8 DPO + 0.2 BCO + 1.0 SFT, as in the module's docstring."""
    quality = losses.bco_pair(*logps, beta=0.1)
    return 0.8 * losses.dpo(*logps) + 0.2 * quality + 1.0 * losses.sft(logps[0])


def test_a_weighted_sum_of_losses_is_a_loss():
    """Mixed preference optimization, against its formula and its parts' gradients."""
    arrays = arrays_of(RPO)
    pc, pr, rc, rr = arrays
    preference = -log_expit(0.1 * ((pc - rc) - (pr - rr)))
    quality = -log_expit(0.1 * (pc - rc)) - log_expit(-0.1 * (pr - rr))
    expected = 0.8 * preference + 0.2 * quality - pc
    np.testing.assert_allclose(
        jax.jit(mpo)(*on_device(arrays, jnp.float32)), expected, rtol=2e-6
    )
    with jax.enable_x64(True):
        arrays = on_device(arrays, jnp.float64)
        np.testing.assert_allclose(mpo(*arrays), expected, rtol=1e-12)
        derivative = lambda loss: jax.grad(lambda *a: jnp.sum(loss(*a)))(*arrays)
        parts = (
            0.8 * derivative(losses.dpo)
            + 0.2 * derivative(functools.partial(losses.bco_pair, beta=0.1))
            - 1.0
        )
        np.testing.assert_allclose(derivative(mpo), parts, rtol=1e-12)


def test_rpo_never_stops_pulling_the_chosen_answer_up():
    """Far beyond the margin, where DPO has no gradient, eta beta is left."""
    zero, far = jnp.zeros(1), jnp.full(1, 1e6)
    loss = lambda first: jnp.sum(losses.rpo(first, zero, zero, zero))
    np.testing.assert_allclose(jax.grad(loss)(far), -0.005 * 0.01, rtol=1e-6)


def test_the_two_likelihood_terms_meet_at_one_token():
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(RPO), jnp.float64)
        one = jnp.ones(PAIRS, jnp.int32)
        average = losses.iterative_rpo(*arrays, one, beta=0.1, alpha=0.02)
        total = losses.rpo(*arrays, beta=0.1, eta=0.2)
    np.testing.assert_allclose(average, total, rtol=1e-12)


@pytest.mark.parametrize("weight", [-1.0, float("inf")])
def test_weights_out_of_range_are_refused(weight):
    zero = jnp.zeros(2)
    with pytest.raises(ValueError, match=f"eta >= 0 and finite, got {weight}"):
        losses.rpo(zero, zero, zero, zero, eta=weight)
    with pytest.raises(ValueError, match=f"alpha >= 0 and finite, got {weight}"):
        losses.iterative_rpo(zero, zero, zero, zero, zero, alpha=weight)
