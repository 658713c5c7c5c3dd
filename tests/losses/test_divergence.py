"""What the divergences promise; the battery is in test_battery.py."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses

ALPHA = 0.3
CASES = {
    "forward_kl_dpo": {},
    "js_dpo": {},
    "alpha_dpo": {"alpha": ALPHA},
    "chi_po": {"max_reward": 10.0},
}


def f_of(name):
    """The convex f of E_ref[f(pi/ref)]."""
    log_mean = lambda u: (1 + u) * jnp.log((1 + u) / 2)
    a = ALPHA
    return {
        "dpo": lambda u: u * jnp.log(u),
        "forward_kl_dpo": lambda u: -jnp.log(u),
        "js_dpo": lambda u: u * jnp.log(u) - log_mean(u),
        "alpha_dpo": lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
        "chi_po": lambda u: jnp.square(u - 1) / 2 + u * jnp.log(u),
    }[name]


def loss_of(name):
    return functools.partial(getattr(losses, name), **CASES.get(name, {}))


def ratios(seed=0, low=-2.0, high=2.0, pairs=32):
    return np.random.default_rng(seed).uniform(low, high, (2, pairs))


@pytest.mark.parametrize("name", ["dpo", *CASES])
def test_link_is_the_derivative_of_the_divergence(name):
    """-log s(beta f'(u_w) - beta f'(u_l)), with f' taken by jax from f."""
    with jax.enable_x64(True):
        chosen, rejected = (jnp.asarray(ratio) for ratio in ratios())
        zero = jnp.zeros_like(chosen)
        link = jax.vmap(jax.grad(f_of(name)))
        margin = 0.1 * (link(jnp.exp(chosen)) - link(jnp.exp(rejected)))
        loss = loss_of(name)(chosen, rejected, zero, zero, beta=0.1)
        np.testing.assert_allclose(loss, jnp.logaddexp(0, -margin), rtol=1e-10)


@pytest.mark.parametrize("name", ["dpo", *CASES])
def test_divergence_is_convex_and_zero_at_the_reference(name):
    """So that f' rises: a likelier answer always has the higher reward."""
    with jax.enable_x64(True):
        u = jnp.exp(jnp.linspace(-3, 3, 61))
        assert (jax.vmap(jax.grad(jax.grad(f_of(name))))(u) > 0).all()
        np.testing.assert_allclose(f_of(name)(jnp.ones(1)), 0, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize("name", CASES)
def test_finite_however_far_from_the_reference(name, side, dtype):
    """P20, on every side: where exp overflows the exponent is clipped."""
    arrays = [jnp.full(6, -1.0, dtype)] * 4
    arrays[side] = jnp.asarray([1e4, -1e4, 1e3, -1e3, 85.0, -85.0], dtype)
    total = lambda *a: jnp.sum(loss_of(name)(*a))
    values = [loss_of(name)(*arrays), *jax.grad(total, argnums=(0, 1))(*arrays)]
    for value in values:
        assert np.isfinite(np.asarray(value, np.float32)).all()


def test_answers_below_the_reference_are_dpos():
    """Where u is small, log u is all there is of the two links that contain it."""
    chosen, rejected = ratios(low=-60, high=-40)
    for name in ("js_dpo", "chi_po"):
        with jax.enable_x64(True):
            arrays = [
                jnp.asarray(a) for a in (chosen, rejected, 0 * chosen, 0 * chosen)
            ]
            ours = loss_of(name)(*arrays, beta=0.1)
            dpo = losses.dpo(*arrays)
        np.testing.assert_allclose(ours, dpo, rtol=1e-12)


def test_chi_po_clips_its_logit():
    """Beyond 2 R either way the loss is level: no gradient."""
    zero = jnp.zeros(4)
    far = jnp.array([3.0, -100.0, 1e4, -1e4])
    loss = lambda far: losses.chi_po(far, zero, zero, zero, beta=0.1, max_reward=0.5)
    value, gradient = loss(far), jax.grad(lambda far: jnp.sum(loss(far)))(far)
    expected = np.logaddexp(0, [-1.0, 1.0, -1.0, 1.0])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("alpha", [0, 1, -0.5, 1.5, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    zero = jnp.zeros(2)
    loss = inspect.unwrap(losses.alpha_dpo)
    with pytest.raises(ValueError, match=rf"alpha in \(0.0, 1.0\), got {alpha}"):
        loss(zero, zero, zero, zero, alpha=alpha)


@pytest.mark.parametrize("bound", [0, -1.0, float("inf")])
def test_max_reward_out_of_range_is_refused(bound):
    zero = jnp.zeros(2)
    with pytest.raises(ValueError, match=f"max_reward > 0 and finite, got {bound}"):
        losses.chi_po(zero, zero, zero, zero, max_reward=bound)
