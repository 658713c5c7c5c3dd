"""The running flip rate: posterior, memory, sharding, and identification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import expit, logsumexp

from jaxpref.noise import running


def labels(seed, count, *, rate, scale=1.0, spread=2.5):
    """Margins of a model that is calibrated up to scale, relative to flipped labels."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, count)
    z = np.where(rng.random(count) < expit(z), z, -z)
    return np.where(rng.random(count) < rate, -z, z) * scale


def counted(margins, **options):
    margins = jnp.asarray(margins, jnp.float32)
    return running.count(running.no_counts(), margins, **options)


def test_counts_by_size_and_agreement():
    counts = counted([0.0, 1e-9, -0.5, 0.5, 0.51, -3.0, 1e30, -jnp.inf])
    assert counts.shape == (112, 2) and counts.sum() == 8
    found = {int(n): counts[n].tolist() for n in np.flatnonzero(counts.sum(1))}
    # Bins of an eighth of an octave from 2^-7: a half lies in bin 48, three in 68.
    expected = {0: [1.5, 0.5], 48: [2, 1], 68: [0, 1], 111: [1, 1]}
    assert found == expected


def test_old_batches_decay_with_the_number_of_new_labels():
    first, second = labels(0, 30, rate=0.2), labels(1, 50, rate=0.2)
    both = running.count(counted(first), jnp.asarray(second, jnp.float32), memory=100.0)
    expected = np.exp(-0.5) * counted(first) + counted(second)
    np.testing.assert_allclose(both, expected, rtol=1e-6)
    nothing = running.count(
        both, jnp.full(4, jnp.nan), memory=1.0, where=jnp.zeros(4, bool)
    )
    np.testing.assert_array_equal(nothing, both)


NAN = float("nan")


@pytest.mark.parametrize(
    "margins",
    [[NAN], [1.0, NAN, 2.0], [NAN, NAN], [[0.5, NAN], [1.0, 2.0]], [-NAN, jnp.inf]],
)
def test_margins_that_are_not_numbers(margins):
    """Named where they can be seen, and NaN wherever they are traced."""
    bad = int(np.isnan(margins).sum())
    with pytest.raises(ValueError, match=f"Expected margins .* got {bad} NaN"):
        counted(margins)
    traced = jax.jit(running.count)(counted([1.0]), jnp.asarray(margins))
    assert np.isnan(traced).all()
    found = jax.jit(running.posterior)(traced)
    assert np.isnan(found.rate) and not found.identified
    where = ~np.isnan(margins)
    real = jnp.asarray(np.array(margins)[where].astype(np.float32))
    masked = running.count(
        running.no_counts(), jnp.asarray(margins), where=jnp.asarray(where)
    )
    np.testing.assert_array_equal(masked, counted(real))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.45])
def test_posterior_against_a_sum_over_labels(rate):
    """Label by label in float64; margins are at the centers of their bins."""
    z = labels(2, 4000, rate=rate, scale=2.0)
    z = np.sign(z) * 2 ** ((np.floor(8 * np.log2(np.abs(z))) + 0.5) / 8)
    z = z[np.abs(z) > 2**-7]
    rates = (np.arange(199) + 0.5) / 398
    steps = np.linspace(-6, 6, 49)
    p = expit(z / 2.0 ** steps[:, None])[:, None]  # [temperatures, 1, labels]
    e = rates[:, None]
    logs = np.stack([np.log((1 - e) * row + e * (1 - row)).sum(-1) for row in p])
    logs += np.log(2 * rates * (1 - 2 * rates)) - (steps[:, None] / 2) ** 2 / 2
    mass = np.exp(logs - logsumexp(logs))
    found = running.posterior(counted(z))
    assert found.rate == pytest.approx(rates[mass.sum(0).argmax()], abs=1e-6)
    temperature = 2 ** (mass.sum(1) * steps).sum()
    np.testing.assert_allclose(found.temperature, temperature, rtol=1e-3)
    cumulated = np.cumsum(mass.sum(0))
    edges = rates + 0.25 / 199
    low, high = np.interp([0.025, 0.975], cumulated, edges)
    np.testing.assert_allclose([found.lower, found.upper], [low, high], atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_the_rate_is_recovered_for_any_scale_of_the_margins(rate, scale):
    found = [
        running.posterior(counted(labels(seed, 16000, rate=rate, scale=scale)))
        for seed in range(5)
    ]
    errors = np.array([x.rate for x in found]) - rate
    assert np.abs(errors).max() < 0.03 and abs(errors.mean()) < 0.015
    assert all(x.identified for x in found)
    np.testing.assert_allclose([x.temperature for x in found], scale, rtol=0.6)


def test_small_margins_do_not_identify_the_rate():
    nothing = running.posterior(running.no_counts())
    assert not nothing.identified
    np.testing.assert_allclose(nothing.rate, 0.25, atol=1e-6)
    small = running.posterior(counted(labels(0, 16000, rate=0.2, spread=0.05)))
    assert not small.identified and small.upper - small.lower > 0.35


def test_sharded_over_eight_devices():
    margins = jnp.asarray(labels(3, 64, rate=0.3), jnp.float32).reshape(2, 32)
    where = jnp.arange(64).reshape(2, 32) % 5 > 0

    def everything(margins, where):
        counts = running.count(running.no_counts(), margins, memory=50.0, where=where)
        return counts, running.posterior(counts)

    eager = everything(margins, where)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, PartitionSpec(None, "data"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in (margins, where)]
        sharded = jax.jit(everything)(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, sharded, eager)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        counts = running.count(running.no_counts(jnp.float64), jnp.ones(3))
        found = running.posterior(counts)
        assert counts.dtype == found.rate.dtype == jnp.float64
