"""What the reference-free losses promise; the battery is in test_battery.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from tests.losses.arrays import arrays_of
from tests.losses.row import EXTREMES
from tests.losses.rows_reference_free import ROWS
from tests.losses.test_battery import gradients, on_device

BY_NAME = {row.name: row for row in ROWS}
AVERAGED = ["alpha_po", "mapo", "orpo", "simpo"]


@pytest.mark.parametrize("name", AVERAGED)
def test_longer_answers_of_the_same_tokens_cost_the_same(name):
    row = BY_NAME[name]
    pc, pr, chosen_lengths, rejected_lengths = on_device(
        arrays_of(row, extreme=False), jnp.float32
    )
    short = row.loss(pc, pr, chosen_lengths, rejected_lengths)
    long = row.loss(4 * pc, 2 * pr, 4 * chosen_lengths, 2 * rejected_lengths)
    np.testing.assert_array_equal(short, long)


def test_alpha_po_goes_over_into_simpo():
    """Nothing jumps and no digit is lost on the way to alpha = 0, from either side."""
    arrays = on_device(arrays_of(BY_NAME["alpha_po"], extreme=False), jnp.float32)
    simpo = losses.simpo(*arrays, beta=2.0, gamma=0.5)
    loss = functools.partial(losses.alpha_po, beta=2.0, gamma=0.5)
    for alpha in (1e-7, -1e-7, 1e-20, 0.0):
        np.testing.assert_allclose(loss(*arrays, alpha=alpha), simpo, rtol=2e-6)
        traced = jax.jit(lambda a: loss(*arrays, alpha=a))(jnp.float32(alpha))
        np.testing.assert_allclose(traced, simpo, rtol=2e-6)
    derivative = jax.grad(lambda c: loss(c, *arrays[1:], alpha=0.0).sum())(arrays[0])
    other = jax.grad(lambda c: losses.simpo(c, *arrays[1:], beta=2.0, gamma=0.5).sum())(
        arrays[0]
    )
    np.testing.assert_allclose(derivative, other, rtol=1e-6)


def test_alpha_po_shapes():
    """alpha = -1 is the linear reward, alpha = 1 the inverse one."""
    chosen, rejected, one = jnp.asarray([0.5]), jnp.asarray([0.25]), jnp.ones(1)
    loss = lambda alpha: losses.alpha_po(
        jnp.log(chosen), jnp.log(rejected), one, one, alpha=alpha, beta=2.0, gamma=0.0
    )
    np.testing.assert_allclose(loss(-1.0), -jax.nn.log_sigmoid(2 * 0.25), rtol=1e-6)
    np.testing.assert_allclose(
        loss(1.0), -jax.nn.log_sigmoid(2.0 * jnp.ones(1) * (4 - 2)), rtol=1e-6
    )


@pytest.mark.parametrize("alpha", [0.25, 2.0, -1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_alpha_po_is_finite_at_extremes(alpha, dtype):
    """Answers of +-1e4 nats per token, on either side."""
    one = jnp.ones(4)
    chosen = jnp.asarray([1e4, -1e4, -1.0, -1.0], dtype)
    rejected = jnp.asarray([-1.0, -1.0, 1e4, -1e4], dtype)
    loss = lambda c, r: jnp.sum(losses.alpha_po(c, r, one, one, alpha=alpha))
    value, derivatives = jax.value_and_grad(loss, argnums=(0, 1))(chosen, rejected)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(s, np.float32)).all() for s in derivatives)


def test_alpha_po_has_gradients_for_very_unlikely_answers():
    one, at = jnp.ones(1), jnp.asarray([-12.0])
    derivative = jax.grad(lambda c: losses.alpha_po(c, at, one, one, alpha=2.0).sum())(
        at
    )
    assert derivative < -1


@pytest.mark.parametrize("alpha", [float("inf"), -float("inf")])
def test_alpha_po_rejects_an_infinite_alpha(alpha):
    arrays = on_device(arrays_of(BY_NAME["alpha_po"]), jnp.float32)
    with pytest.raises(ValueError, match=f"alpha finite, got {alpha}"):
        losses.alpha_po(*arrays, alpha=alpha)


def test_cpo_is_dpo_without_a_reference_and_likelihood():
    pc, pr, lengths = on_device(arrays_of(BY_NAME["cpo"]), jnp.float32)
    zero = jnp.zeros_like(pc)
    np.testing.assert_array_equal(
        losses.cpo(pc, pr, lengths, beta=0.3, nll_weight=0.0),
        losses.dpo(pc, pr, zero, zero, beta=0.3),
    )
    # The likelihood term is `sft` per token.
    term = losses.cpo(pc, pr, lengths) - losses.cpo(pc, pr, lengths, nll_weight=0.0)
    np.testing.assert_allclose(term, losses.sft(pc) / lengths, rtol=1e-4, atol=1e-4)


def test_orpo_is_the_odds_ratio():
    """In probabilities: -log p_w - beta log(odds_w / (odds_w + odds_l))."""
    p_w, p_l, one = jnp.asarray([0.5, 0.9]), jnp.asarray([0.75, 0.1]), jnp.ones(2)
    odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)
    expected = -jnp.log(p_w) - 0.2 * jnp.log(odds_w / (odds_w + odds_l))
    loss = losses.orpo(jnp.log(p_w), jnp.log(p_l), one, one, beta=0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orpo_of_certain_answers_is_finite(dtype):
    """Averages at 0, just below, or above by rounding, on one or both sides."""
    edge = jnp.asarray([0.0, -1e-7, -2e-6, 1e-7, -1e4], dtype)
    chosen, rejected = (x.reshape(-1) for x in jnp.meshgrid(edge, edge))
    row, one = BY_NAME["orpo"], jnp.ones(25)
    for value in [
        row.loss(chosen, rejected, one, one),
        *gradients(row, [chosen, rejected, one, one]),
    ]:
        assert np.isfinite(value).all()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unlikely_answers_on_the_rejected_side_are_finite(name, dtype):
    row = BY_NAME[name]
    arrays = on_device(arrays_of(row, extreme=False), dtype)
    arrays[1] = arrays[1].at[: len(EXTREMES)].set(jnp.asarray(EXTREMES, dtype))
    for options in row.options:
        for value in [row.loss(*arrays, **options), *gradients(row, arrays, **options)]:
            assert np.isfinite(value).all()


def test_mapo_margin_is_bounded_with_a_vanishing_gradient():
    """The margin term stays within (-log s(1), -log s(-1)) times beta."""
    averages = jnp.linspace(-60, 0, 241)
    chosen, rejected = (x.reshape(-1) for x in jnp.meshgrid(averages, averages))
    one = jnp.ones_like(chosen)
    term = losses.mapo(chosen, rejected, one, one, beta=1.0) + chosen
    assert (term > np.log1p(np.exp(-1.0)) - 1e-5).all()
    assert (term < np.log1p(np.exp(1.0)) + 1e-5).all()
    pull = jax.grad(lambda r: losses.mapo(chosen, r, one, one).sum())(rejected)
    assert (pull >= 0).all()
    np.testing.assert_allclose(pull[rejected < -30], 0, atol=1e-10)
