"""Properties of symmetric and bounded losses, beyond test_battery.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses

SYMMETRIC = {
    "sympo_ramp": 1.0,
    "sympo_sigmoid": 1.0,
    "sympo_unhinged": 2.0,
}
BOUNDED = ("holder_dpo", "power_dpo", "sympo_ramp", "sympo_sigmoid")


def curve(name, h, **options):
    """The gradient and the value of a loss at reward margins `h`."""
    loss = functools.partial(getattr(losses, name), beta=1.0, **options)
    h = jnp.asarray(h)
    zero = jnp.zeros_like(h)
    gradient = jax.grad(lambda z: loss(z, zero, zero, zero).sum())(h)
    return gradient, loss(h, zero, zero, zero)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_flips_scale_and_shift_a_symmetric_loss(name, rate):
    """P8: (1 - e) loss(h) + e loss(-h) = (1 - 2e) loss(h) + e constant."""
    with jax.enable_x64(True):
        h = np.linspace(-30, 30, 601)
        gradient, loss = curve(name, h)
        other_gradient, other = curve(name, -h)
        mean = (1 - rate) * loss + rate * other
        expected = (1 - 2 * rate) * loss + rate * SYMMETRIC[name]
        mean_gradient = (1 - rate) * gradient - rate * other_gradient
        np.testing.assert_allclose(mean, expected, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(mean_gradient, (1 - 2 * rate) * gradient, atol=1e-14)


@pytest.mark.parametrize("name", BOUNDED)
def test_gradients_of_strongly_contradicted_pairs_vanish(name):
    """Redescending: the gradient at h = -40 is negligible compared with h = 0."""
    with jax.enable_x64(True):
        gradient, loss = curve(name, [-1e4, -40.0, 0.0])
        assert abs(gradient[0]) == 0 and abs(gradient[1]) < 1e-10 and gradient[2] < -0.2
        assert np.isfinite(loss).all() and abs(loss[0] - loss[1]) < 1e-10


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0])
def test_power_dpo_weights_the_gradient_of_dpo(power):
    """The gradient is DPO's times s(h)^q, and the values are in [0, 1/q]."""
    with jax.enable_x64(True):
        h = np.linspace(-20, 20, 401)
        gradient, loss = curve("power_dpo", h, power=power)
        plain, _ = curve("dpo", h)
        weight = jax.nn.sigmoid(jnp.asarray(h)) ** power
        np.testing.assert_allclose(gradient, plain * weight, rtol=1e-10, atol=1e-15)
        assert (loss >= 0).all() and (loss <= 1 / power).all()


def test_power_dpo_near_0_is_dpo():
    with jax.enable_x64(True):
        h = np.linspace(-20, 20, 401)
        for got, expected in zip(curve("power_dpo", h, power=1e-9), curve("dpo", h)):
            np.testing.assert_allclose(got, expected, rtol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 8.0])
def test_holder_dpo_gradient(gamma):
    """-gamma (1 + gamma) s(h)^gamma s(-h)^2, which is redescending."""
    with jax.enable_x64(True):
        h = np.linspace(-20, 20, 401)
        gradient, loss = curve("holder_dpo", h, gamma=gamma)
        s = jax.nn.sigmoid(jnp.asarray(h))
        t = jax.nn.sigmoid(-jnp.asarray(h))
        expected = -gamma * (1 + gamma) * s**gamma * t**2
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-15)
        assert (loss <= 0).all() and (loss >= -1).all()


@pytest.mark.parametrize("power", [0, -0.5, 1.1, float("nan")])
def test_power_out_of_range_is_rejected(power):
    zero = jnp.zeros(2)
    with pytest.raises(ValueError, match=rf"power in \(0, 1\], got {power}"):
        losses.power_dpo(zero, zero, zero, zero, power=power)
