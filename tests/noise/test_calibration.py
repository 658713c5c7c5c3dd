"""The temperature of margins, alone and jointly with the flip rate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.optimize import minimize
from scipy.special import expit

from jaxpref.noise import calibration, em
from tests.noise.simulations import fit, votes


def finite(*fits) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fits))


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_known_outcomes_give_the_temperature(scale):
    """Against scipy; the interval contains the truth."""
    data = votes(0, reliability=1.0, items=4000)
    margins, right = scale * data.orientation * data.margins, data.orientation > 0
    found = calibration.fit_temperature(
        jnp.asarray(margins, jnp.float32), jnp.asarray(right, jnp.float32)
    )

    def nll(log_t):
        z = margins / np.exp(log_t[0])
        return np.logaddexp(0, np.where(right, -z, z)).sum()

    best = minimize(nll, [0.0], method="BFGS")
    np.testing.assert_allclose(found.temperature, np.exp(best.x[0]), rtol=1e-3)
    assert found.lower < scale < found.upper and found.identified


@pytest.mark.parametrize(
    "scale",
    [0.25, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.5, 1.0, 2.0, 4.0))],
)
def test_temperature_and_rate_from_noisy_labels(scale):
    """A reliability of 0.8, which EM alone estimates as 1.00 to 0.72, within 0.01."""
    data = votes(1, reliability=0.8, items=200_000)
    margins = jnp.asarray(scale * data.margins, jnp.float32)
    temperature, rate = calibration.fit_temperature_and_rate(margins)
    np.testing.assert_allclose(rate.rate, 0.2, atol=0.01)
    np.testing.assert_allclose(temperature.temperature, scale, rtol=0.05)
    assert temperature.identified and rate.identified
    assert rate.upper - rate.lower < 0.012
    again = fit(data, num_annotators=1, margins=margins / temperature.temperature)
    np.testing.assert_allclose(again.reliability, 0.8, atol=0.01)


def test_temperature_and_rate_against_scipy():
    margins = 2 * votes(2, reliability=0.75, items=3000).margins
    temperature, rate = calibration.fit_temperature_and_rate(
        jnp.asarray(margins, jnp.float32)
    )

    def nll(x):
        e, p = expit(x[1]) / 2, expit(margins / np.exp(x[0]))
        return -np.log((1 - e) * p + e * (1 - p)).sum()

    best = minimize(nll, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6})
    np.testing.assert_allclose(temperature.temperature, np.exp(best.x[0]), rtol=0.01)
    np.testing.assert_allclose(rate.rate, expit(best.x[1]) / 2, atol=2e-3)
    np.testing.assert_allclose(rate.log_likelihood, -best.fun, atol=0.05)

    def profile(e):
        """The likelihood at the best temperature for this rate."""
        p = lambda t: expit(margins / np.exp(t[0]))
        at = lambda t: -np.log((1 - e) * p(t) + e * (1 - p(t))).sum()
        return minimize(at, best.x[:1], method="BFGS").fun

    for end in (rate.lower, rate.upper):
        np.testing.assert_allclose(profile(float(end)) - best.fun, 1.92, atol=0.1)


def test_temperature_may_not_be_identified():
    """Small margins and pure noise do not identify it, but give no NaN either."""
    small = votes(3, reliability=0.8, items=5000, spread=0.3).margins
    noise = votes(3, reliability=0.5, items=5000).margins
    for margins in (small, noise, np.zeros(100), np.ones(3), -np.ones(3)):
        temperature, rate = calibration.fit_temperature_and_rate(
            jnp.asarray(margins, jnp.float32)
        )
        assert not temperature.identified and finite(temperature, rate)
        assert temperature.lower <= temperature.temperature <= temperature.upper
        assert rate.lower <= rate.rate <= rate.upper
    small_rate = calibration.fit_temperature_and_rate(jnp.asarray(small))[1]
    assert not small_rate.identified and small_rate.lower < 0.2 < small_rate.upper


def test_votes_on_shared_items_identify_the_temperature():
    """Five votes per item, four annotators: T within 5%, reliabilities within 0.02."""
    four = np.array([0.95, 0.8, 0.6, 0.3])
    data = votes(4, reliability=four, items=6000, votes_per_item=5, spread=2.0)
    temperature, found = calibration.fit_temperature_and_reliability(
        jnp.asarray(3 * data.margins, jnp.float32),
        jnp.asarray(data.annotators),
        items=jnp.asarray(data.items),
        num_annotators=4,
    )
    np.testing.assert_allclose(temperature.temperature, 3, rtol=0.05)
    assert temperature.lower < 3 < temperature.upper and temperature.identified
    np.testing.assert_allclose(found.reliability, four, atol=0.02)


def test_degenerate_outcomes():
    """Separated, uninformative, or no outcomes: finite and within the range."""
    ones = jnp.ones(50)
    separated = calibration.fit_temperature(ones, ones)
    assert separated.temperature < 0.01 and finite(separated)
    useless = calibration.fit_temperature(ones, jnp.zeros(50))
    assert useless.temperature > 100 and finite(useless)
    absent = calibration.fit_temperature(
        jnp.full(3, jnp.nan), ones[:3], where=jnp.zeros(3, bool)
    )
    assert not absent.identified and finite(absent)
    masked = calibration.fit_temperature_and_rate(
        jnp.full(3, jnp.nan), where=jnp.zeros(3, bool)
    )
    assert not masked[0].identified and not masked[1].identified and finite(masked)
    alone, found = calibration.fit_temperature_and_reliability(
        jnp.array([1.0, 2.0, -3.0]), jnp.full(3, -1), num_annotators=1
    )
    assert not alone.identified and finite(alone, found)


def test_sharded_over_eight_devices():
    data = votes(5, reliability=0.8, items=512)
    margins = jnp.asarray(data.margins, jnp.float32)
    weights = em.posterior(margins, 0.8)

    def everything(margins, weights):
        return (
            calibration.fit_temperature(margins, weights),
            calibration.fit_temperature_and_rate(margins),
        )

    eager = everything(margins, weights)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in (margins, weights)]
        sharded = jax.jit(everything)(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-3)
    jax.tree.map(close, sharded, eager)


def test_invalid_options_are_rejected():
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 0"):
        calibration.fit_temperature_and_rate(jnp.ones(3), level=0)
    with pytest.raises(ValueError, match=r"weights of the same shape, got \(3,\)"):
        calibration.fit_temperature(jnp.ones(3), jnp.ones(2))
