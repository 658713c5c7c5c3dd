"""Properties of the losses for noisy labels, beyond test_battery.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import expit, logit

from jaxpref import losses
from tests.losses.arrays import PAIRS, arrays_of, swapped
from tests.losses.row import reward_margin
from tests.losses.rows_robust import ROWS
from tests.losses.test_battery import on_device

CDPO = next(row for row in ROWS if row.loss is losses.cdpo)


def policy_gradient(loss, arrays, **options):
    """Gradient of the summed loss in the policy's chosen log-probs."""
    total = lambda first, *rest: jnp.sum(loss(first, *rest, **options))
    return jax.grad(total)(*arrays)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4, 0.49])
def test_rdpo_mean_over_flips_is_clean_dpo(rate):
    """P1: (1 - e) loss(pair) + e loss(swapped pair) = dpo(pair), everywhere."""
    row = CDPO
    arrays = arrays_of(row)
    with jax.enable_x64(True):
        kept = losses.rdpo(*on_device(arrays, jnp.float64), flip_rate=rate)
        flipped = losses.rdpo(
            *on_device(swapped(row, arrays), jnp.float64), flip_rate=rate
        )
        clean = losses.dpo(*on_device(arrays, jnp.float64))
        mean = (1 - rate) * kept + rate * flipped
    np.testing.assert_allclose(mean, clean, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_rdpo_and_cdpo_correct_in_opposite_directions(rate):
    """P2: (1 - 2e)(rdpo - dpo) + (cdpo - dpo) = 0."""
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(CDPO), jnp.float64)
        dpo = losses.dpo(*arrays)
        rdpo = losses.rdpo(*arrays, flip_rate=rate)
        cdpo = losses.cdpo(*arrays, flip_rate=rate)
        unbiased, smoothed = (1 - 2 * rate) * (rdpo - dpo), cdpo - dpo
    np.testing.assert_allclose(unbiased, -smoothed, rtol=1e-10, atol=1e-10)


MINIMIZERS = {
    "dpo": lambda p, q, e: logit(q),
    "cdpo": lambda p, q, e: logit((1 - e) * q + e * (1 - q)),
    "rdpo": lambda p, q, e: logit(p),
    "forward_dpo": lambda p, q, e: logit(p),
}


@pytest.mark.parametrize("name", MINIMIZERS)
@pytest.mark.parametrize(
    ("p", "rate"), list(itertools.product([0.2, 0.8, 0.95], [0.1, 0.3, 0.4]))
)
def test_population_minimizer(name, p, rate):
    """P3: the minimizer of each loss if P(w > l) = p and labels flip at `rate`."""
    observed = (1 - rate) * p + rate * (1 - p)
    expected = MINIMIZERS[name](p, observed, rate)
    options = {"beta": 1.0} | ({} if name == "dpo" else {"flip_rate": rate})
    loss = functools.partial(getattr(losses, name), **options)
    grid = np.linspace(-6, 6, 24001)
    with jax.enable_x64(True):
        zero = jnp.zeros(grid.shape)
        risk = lambda h: (
            observed * loss(h, zero, zero, zero)
            + (1 - observed) * loss(zero, h, zero, zero)
        )
        best = grid[np.argmin(risk(jnp.asarray(grid)))]
        gradient = jax.grad(lambda h: risk(h)[0])(jnp.full(grid.shape, expected))[0]
        gradient = float(gradient)
    assert abs(best - expected) <= 6e-4  # just over the grid's step
    assert abs(gradient) < 1e-12


def test_forward_dpo_beyond_one_half():
    """P4: no gradient at e = 1/2; above 1/2, the label is inverted."""
    row = CDPO
    arrays = on_device(arrays_of(row), jnp.float32)
    half = policy_gradient(losses.forward_dpo, arrays, flip_rate=jnp.full(PAIRS, 0.5))
    np.testing.assert_allclose(half, 0, atol=1e-8)
    over = losses.forward_dpo(*arrays, flip_rate=jnp.full(PAIRS, 0.75))
    exchanged = losses.forward_dpo(*swapped(row, arrays), flip_rate=0.25)
    np.testing.assert_allclose(over, exchanged, rtol=1e-6, atol=1e-6)


def test_forward_dpo_gradient_is_weighted_by_the_posterior():
    """P4: its gradient is w grad dpo(pair) + (1 - w) grad dpo(swapped), w held fixed.

    w = P(label right | margin) is RE-PO's E-step, logit w = h + logit(1 - e).
    """
    rate, beta = 0.3, 1.0
    row = CDPO
    arrays = arrays_of(row, extreme=False)
    h = reward_margin(*arrays, beta=beta)
    weight = expit(h + logit(1 - rate))
    with jax.enable_x64(True):
        on = on_device(arrays, jnp.float64)
        forward = policy_gradient(losses.forward_dpo, on, beta=beta, flip_rate=rate)
        kept = policy_gradient(losses.dpo, on, beta=beta)
        other = lambda pc, pr, rc, rr, **o: losses.dpo(pr, pc, rr, rc, **o)
        flipped = policy_gradient(other, on, beta=beta)
    mixed = weight * np.asarray(kept) + (1 - weight) * np.asarray(flipped)
    np.testing.assert_allclose(forward, mixed, rtol=1e-10, atol=1e-12)


def test_forward_dpo_learns_its_rate():
    """Rates per pair are differentiable, so they can be estimated."""
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(CDPO, extreme=False), jnp.float64)
        loss = lambda rate: losses.forward_dpo(*arrays, flip_rate=rate)
        check_grads(jax.jit(loss), (jnp.full(PAIRS, 0.2),), order=1, modes=("rev",))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 14.0])
def test_ropo_weights_are_at_most_1(alpha):
    """P8: the largest weight is 1, at s(-h) = (1 + alpha) / (2 alpha)."""
    with jax.enable_x64(True):
        h = jnp.asarray(np.linspace(-30, 30, 6001))
        zero = jnp.zeros_like(h)
        arrays = [h, zero, zero, zero]
        weight = -policy_gradient(losses.ropo, arrays, beta=1.0, alpha=alpha)
        assert weight.max() <= 1 + 1e-12
        np.testing.assert_allclose(weight[0], 4 * alpha / (1 + alpha) ** 2, rtol=1e-9)
        if alpha > 1:
            top = jnp.full(1, -logit((1 + alpha) / (2 * alpha)))
            arrays = [top, *[jnp.zeros(1)] * 3]
            most = -policy_gradient(losses.ropo, arrays, beta=1.0, alpha=alpha)
            np.testing.assert_allclose(most, 1, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_noise_tolerant_term_of_ropo_is_only_scaled_by_flips(rate):
    """P8: for alpha -> infinity, mean over flips = (1 - 2e) loss + constant."""
    with jax.enable_x64(True):
        h = jnp.asarray(np.linspace(-30, 30, 601))
        zero = jnp.zeros_like(h)
        loss = functools.partial(losses.ropo, beta=1.0, alpha=1e12)
        kept, flipped = loss(h, zero, zero, zero), loss(zero, h, zero, zero)
        mean = (1 - rate) * kept + rate * flipped
        np.testing.assert_allclose(mean, (1 - 2 * rate) * kept + 4 * rate, rtol=1e-9)
