"""The maximum-likelihood flip rate: optimum, interval, and identification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit
from scipy.stats import chi2

from jaxpref import losses
from jaxpref.noise import rate
from tests.noise.simulations import votes


def nll(margins, e) -> float:
    p = expit(margins)
    return -np.log((1 - e) * p + e * (1 - p)).sum()


@pytest.mark.parametrize("e", [0.0, 0.1, 0.25, 0.4])
def test_shrunken_nll_is_smallest_at_the_margins_without_flips(e):
    """For normal margins, by quadrature: the expected loss of w m is smallest at w = 1.

    c solves E[m (e + (1 - 2e) s(m))] = E[m s(c m)].
    """
    points, weights = np.polynomial.hermite_e.hermegauss(120)
    m, weights = 1.5 * points, weights / weights.sum()
    right = e + (1 - 2 * e) * expit(m)
    c = brentq(lambda c: weights @ (m * (right - expit(c * m))), 1e-3, 1.5)
    loss = lambda z: rate.shrunken_nll(z, c)
    with jax.enable_x64(True):
        z = jnp.asarray(m)
        mean = lambda w: weights @ (right * loss(w * z) + (1 - right) * loss(-w * z))
        derivative = float(jax.grad(mean)(1.0))
        curvature = float(jax.grad(jax.grad(mean))(1.0))
        at_zero = jax.device_get(jax.value_and_grad(loss)(0.0))
    assert abs(derivative) < 1e-9 and curvature > 0.05
    np.testing.assert_allclose(at_zero, [np.log(2), -0.5], rtol=1e-12)


@pytest.mark.parametrize("e", [0.0, 1e-30, 0.25, 0.5, 0.75, 1.0])
def test_the_gradients_of_marginal_nll_at_the_ends_of_the_rate(e):
    """By the quotient rule on P = (1 - e) s(z) + e s(-z), in float64."""
    z = np.array([-30.0, -3.0, -0.1, 0.0, 0.1, 3.0, 30.0])
    with jax.enable_x64(True):
        p = expit(z) * (1 - e) + expit(-z) * e
        by_z, by_rate = jax.vmap(jax.grad(rate.marginal_nll, (0, 1)), (0, None))(
            jnp.asarray(z), jnp.asarray(e)
        )
        np.testing.assert_allclose(by_rate, (expit(z) - expit(-z)) / p, rtol=1e-12)
        gradient = expit(z) * expit(-z) * (1 - 2 * e)
        np.testing.assert_allclose(by_z, -gradient / p, rtol=1e-12)
        # Twice: d^2 nll / de^2 = (d nll / de)^2, since P is linear in e.
        again = jax.vmap(jax.grad(jax.grad(rate.marginal_nll, 1), 1), (0, None))
        found = again(jnp.asarray(z), jnp.asarray(e))
        np.testing.assert_allclose(found, np.square(by_rate), rtol=1e-10)


def test_gradients_that_float32_cannot_hold_do_not_spoil_others():
    z = jnp.array([-1e30, -200.0, 200.0, 1e30])
    for e in (0.0, 1.0):
        by_z, by_rate = jax.grad(lambda z, e: rate.marginal_nll(z, e).sum(), (0, 1))(
            z, jnp.full(4, e)
        )
        assert np.isfinite(by_z).all() and np.isfinite(by_rate).all()
        right = np.array([-1, -1, 0, 0] if e == 0 else [0, 0, 1, 1])
        np.testing.assert_allclose(by_z, right, atol=1e-6)


def test_marginal_nll_is_forward_dpo():
    """In value and both gradients; finite at the extremes; log 2 at 1/2."""
    with jax.enable_x64(True):
        z, zero = jnp.linspace(-40, 40, 33), jnp.zeros(33)
        forward = functools.partial(losses.forward_dpo, beta=1.0)
        ours = lambda z, e: rate.marginal_nll(z, e).sum()
        theirs = lambda z, e: forward(z, zero, zero, zero, flip_rate=e).sum()
        e = jnp.linspace(0.01, 0.6, 33)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14)
        jax.tree.map(
            close,
            jax.value_and_grad(ours, (0, 1))(z, e),
            jax.value_and_grad(theirs, (0, 1))(z, e),
        )
        check_grads(lambda e: rate.marginal_nll(z, e), (0.3,), order=1)
    z = jnp.array([-1e30, -1e4, 0.0, 1e4, 1e30])
    assert np.isfinite(rate.marginal_nll(z, 0.3)).all()
    np.testing.assert_allclose(rate.marginal_nll(z, 0.5), np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(rate.marginal_nll(z, 0.0), -jax.nn.log_sigmoid(z))


@pytest.mark.parametrize("flip_rate", [0.05, 0.2, 0.4])
def test_fit_and_interval_against_scipy(flip_rate):
    """The optimum and both ends of the interval, where it is lower by chi2 / 2."""
    margins = votes(0, reliability=1 - flip_rate, items=800).margins
    found = rate.fit_rate(jnp.asarray(margins, jnp.float32), level=0.9)
    best = minimize_scalar(
        lambda e: nll(margins, e), bounds=(0, 0.5), options={"xatol": 1e-9}
    )
    np.testing.assert_allclose(found.rate, best.x, atol=2e-5)
    np.testing.assert_allclose(found.log_likelihood, -best.fun, rtol=1e-6)
    above = lambda e: nll(margins, e) - best.fun - chi2.ppf(0.9, 1) / 2
    lower = brentq(above, 1e-9, best.x) if above(1e-9) > 0 else 0.0
    upper = brentq(above, best.x, 0.5) if above(0.5) > 0 else 0.5
    np.testing.assert_allclose([found.lower, found.upper], [lower, upper], atol=2e-4)
    assert found.identified


def test_recovers_the_rate():
    for e in (0.1, 0.3, 0.45):
        margins = votes(1, reliability=1 - e, items=200_000).margins
        found = rate.fit_rate(jnp.asarray(margins, jnp.float32))
        np.testing.assert_allclose(found.rate, e, atol=0.01)
        assert found.lower < found.rate < found.upper and found.identified


@pytest.mark.parametrize(
    "margins",
    [[0.0] * 1000, [1.0, 2.0, -3.0], [0.01, -0.01] * 500, [5.0], [jnp.inf, -jnp.inf]],
)
def test_the_rate_may_not_be_identified(margins):
    found = rate.fit_rate(jnp.array(margins))
    assert not found.identified
    assert found.upper - found.lower > 0.25
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(found))


def test_all_labels_agree_or_contradict():
    """Only agreement gives almost no flips; only contradiction gives the bound 1/2."""
    agree, contradict = (rate.fit_rate(jnp.full(500, z)) for z in (6.0, -6.0))
    assert agree.rate < 1e-3 and agree.upper < 0.02
    assert contradict.rate > 0.499 and contradict.lower > 0.45
    nothing = rate.fit_rate(jnp.full(4, jnp.nan), where=jnp.zeros(4, bool))
    assert not nothing.identified and nothing.rate == 0.25
    assert nothing.log_likelihood == 0


def test_sharded_over_eight_devices():
    margins = jnp.asarray(votes(4, reliability=0.8, items=128).margins, jnp.float32)
    eager = rate.fit_rate(margins)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        sharded = jax.jit(rate.fit_rate)(jax.device_put(margins, sharding))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, sharded, eager)


def test_invalid_options_are_rejected():
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 2"):
        rate.fit_rate(jnp.ones(3), level=2)
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2,\)"):
        rate.fit_rate(jnp.ones(3), where=jnp.ones(2, bool))
