"""What the losses of the margin promise; the battery is in test_battery.py."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

from jaxpref import losses


def of_margin(loss, margins, dtype=jnp.float64, **options):
    """The loss and its gradient at these log-ratio margins."""
    with jax.enable_x64(True):
        margins = jnp.asarray(margins, dtype)
        zero = jnp.zeros_like(margins)
        total = lambda m: jnp.sum(loss(m, zero, zero, zero, **options))
        value = loss(margins, zero, zero, zero, **options)
        return np.asarray(value), np.asarray(jax.grad(total)(margins))


GRID = np.linspace(-30.0, 30.0, 601)


@pytest.mark.parametrize("target", [1e-3, 0.1, 0.4])
def test_exo_pair_is_a_divergence(target):
    """P13: never negative, and 0 only where the model gives what the target says."""
    exo = functools.partial(losses.exo_pair, beta=1.0, label_smoothing=target)
    value, _ = of_margin(exo, GRID)
    at_target, gradient = of_margin(exo, [logit(1 - target)])
    assert (value[np.abs(GRID - logit(1 - target)) > 1e-3] > 0).all()
    np.testing.assert_allclose(at_target, 0, atol=1e-14)
    np.testing.assert_allclose(gradient, 0, atol=1e-14)


def test_exo_pair_lets_contradicted_pairs_go():
    """Its gradient is s(h) s(-h) (h - h*), bounded and redescending."""
    exo = functools.partial(losses.exo_pair, beta=1.0, label_smoothing=0.01)
    value, gradient = of_margin(exo, GRID)
    expected = expit(GRID) * expit(-GRID) * (GRID - logit(0.99))
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-15)
    assert value.max() <= -np.log(0.01)
    assert abs(gradient[0]) < 1e-11


def test_hinge_is_silent_beyond_its_margin():
    value, gradient = of_margin(losses.hinge, GRID)
    np.testing.assert_array_equal(value[GRID > 20], 0)
    np.testing.assert_array_equal(gradient[GRID > 20.05], 0)
    np.testing.assert_allclose(gradient[GRID < 19.95], -0.05)


def test_discopop_is_two_losses():
    """Logistic for pairs ordered wrong, exponential for pairs ordered right."""
    value, _ = of_margin(losses.discopop, GRID, beta=1.0)
    logistic, _ = of_margin(losses.dpo, GRID, beta=1.0)
    wrong, right = GRID < -2, GRID > 2
    np.testing.assert_allclose(value[wrong], logistic[wrong], rtol=1e-12)
    np.testing.assert_allclose(value[right], np.exp(-GRID[right]), rtol=1e-10)


def test_discopop_has_a_bump():
    """A local minimum below h = 0 and a local maximum above: it is not convex."""
    margins = np.linspace(-0.5, 0.5, 1001)
    _, gradient = of_margin(losses.discopop, margins, beta=1.0)
    turns = margins[1:][np.diff(np.sign(gradient)) != 0]
    assert len(turns) == 2 and -0.2 < turns[0] < 0 < turns[1] < 0.2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_discopop_is_finite_where_its_exponential_is_not(dtype):
    """P20: tau > 1 grows like an exponential, which is clipped."""
    margins = [1e4, -1e4, 100.0, -100.0]
    value, gradient = of_margin(losses.discopop, margins, dtype, beta=1.0, tau=2.0)
    assert np.isfinite(value).all() and np.isfinite(gradient.astype(np.float32)).all()
    np.testing.assert_allclose(value[1], np.exp(80), rtol=1e-5)
    np.testing.assert_allclose(value[3], np.exp(50), rtol=1e-4)


@pytest.mark.parametrize("target", [0, -0.1, 0.5, 1, float("nan")])
def test_exo_target_out_of_range_is_refused(target):
    zero = jnp.zeros(2)
    exo = inspect.unwrap(losses.exo_pair)
    match = rf"label_smoothing in \(0.0, 0.5\), got {target}"
    with pytest.raises(ValueError, match=match):
        exo(zero, zero, zero, zero, label_smoothing=target)


@pytest.mark.parametrize("tau", [0, -1.0, float("inf")])
def test_discopop_tau_out_of_range_is_refused(tau):
    zero = jnp.zeros(2)
    with pytest.raises(ValueError, match=f"tau > 0 and finite, got {tau}"):
        losses.discopop(zero, zero, zero, zero, tau=tau)
