"""The running flip rate: counts, posterior, drift, sharding, and identification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import expit, logsumexp
from scipy.stats import beta, chi2, norm

from jaxpref.noise import running
from tests.noise import drift


def labels(seed, count, *, rate, scale=1.0, spread=2.5):
    """Margins of a model that is calibrated up to scale, relative to flipped labels."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, count)
    z = np.where(rng.random(count) < expit(z), z, -z)
    return np.where(rng.random(count) < rate, -z, z) * scale


def counted(margins, *, start=None, **options):
    margins = jnp.asarray(margins, jnp.float32)
    return running.count(start or running.no_counts(), margins, **options)


def in_batches(margins, size=64):
    """The counts after a pass in batches."""
    return _in_batches(jnp.asarray(margins, jnp.float32).reshape(-1, size))


@jax.jit
def _in_batches(batches):
    add = lambda counts, batch: (running.count(counts, batch), None)
    return jax.lax.scan(add, running.no_counts(), batches)[0]


def test_counts_by_size_and_agreement():
    # The mean size is 1.
    z = np.array([0.0, 1e-9, -0.5, 0.5, 0.51, -1.49, 1.0, -4.0])
    counts = counted(z)
    assert counts.table.shape == (16, 72, 2) and counts.table.sum() == counts.labels
    assert not counts.table[1:].any()
    table = counts.table[0]
    found = {int(n): table[n].tolist() for n in np.flatnonzero(table.sum(1))}
    # Bins of an eighth of an octave from 2^-6: a half lies in bin 40, four in the last
    # but seven.
    expected = {0: [1.5, 0.5], 40: [2, 1], 48: [1, 0], 52: [0, 1], 64: [0, 1]}
    assert found == expected
    np.testing.assert_allclose(running.sizes(counts, jnp.asarray(z)), np.abs(z))


def test_the_scale_of_the_margins_does_not_matter():
    z = labels(0, 512, rate=0.2)
    for factor in (2.0**-30, 2.0**10):
        np.testing.assert_array_equal(in_batches(factor * z).table, in_batches(z).table)


def test_the_mean_size_follows_the_margins():
    """A mean with weights exp(-age / 256), in labels."""
    z = labels(0, 640, rate=0.2) * np.linspace(0.1, 1, 640)
    weights = np.repeat(np.exp(-64 * np.arange(9, -1, -1) / 256), 64)
    found = in_batches(z)
    mean = np.average(np.abs(z), weights=weights)
    np.testing.assert_allclose(found.size_sum / found.size_weight, mean, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 64, 100])
def test_any_number_of_labels_fills_at_least_half_of_the_blocks(size):
    counts, first = running.no_counts(), max(size, 64)
    count = jax.jit(running.count)
    for step in range(1, 50):
        counts = count(counts, jnp.full(size, (-1.0) ** step))
        assert counts.labels == counts.table.sum() == size * step
        of_blocks = np.asarray(counts.table.sum((1, 2)))
        length = float(counts.block_length)
        assert np.log2(length / first) % 1 == 0
        used = int(np.ceil(size * step / length))
        assert not of_blocks[used + 1 :].any() and used <= 16
        assert used >= 8 or length == first
        full = of_blocks[: used - 1]
        assert np.all(np.abs(full - length) <= size)


NAN = float("nan")


@pytest.mark.parametrize(
    "margins",
    [[NAN], [[0.5, NAN], [1.0, 2.0]], [-NAN, jnp.inf]],
)
def test_margins_that_are_not_numbers(margins):
    """Named where they can be seen, and NaN wherever they are traced."""
    bad = int(np.isnan(margins).sum())
    with pytest.raises(ValueError, match=f"Expected margins .* got {bad} NaN"):
        counted(margins)
    traced = jax.jit(running.count)(counted([1.0]), jnp.asarray(margins))
    assert np.isnan(traced.table[0]).all()
    found = jax.jit(running.posterior)(traced)
    assert np.isnan([found.rate, found.lower, found.upper]).all()
    assert not found.identified
    where = ~np.isnan(margins)
    real = jnp.asarray(np.array(margins)[where].astype(np.float32))
    masked = counted(margins, where=jnp.asarray(where))
    jax.tree.map(np.testing.assert_array_equal, masked, counted(real))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_posterior_against_a_sum_over_all_temperatures(rate):
    """Two blocks in float64, with margins at the centers of their bins."""
    z = labels(2, 600, rate=rate).reshape(2, -1)
    u = 2 ** ((np.floor(8 * np.log2(np.abs(z))) + 0.5) / 8)
    z = np.sign(z) * u
    place = np.clip(8 * np.log2(u) + 48, 0, 71).astype(int)
    table = np.zeros((16, 72, 2), np.float32)
    np.add.at(table, (np.arange(2)[:, None], place, (z < 0).astype(int)), 1)
    length, zero = jnp.float32(300), jnp.float32(0)
    found = running.posterior(
        running.Counts(jnp.asarray(table), 2 * length, length, zero, zero)
    )
    u = 2 ** ((place + 0.5) / 8 - 6)
    some = slice(None, None, 4)
    rates, logs_t = np.linspace(0, 0.5, 101), np.linspace(-3, 7, 81)
    start = norm.pdf(logs_t, 0, 2)
    start = start / start.sum() / 2 + (logs_t > 3.99) / (2 * 25)
    powers = np.array([-0.5, -0.25, 0, 0.25, 0.5])
    of_power = norm.pdf(powers, 0, 0.25)
    total = []
    for power, weight in zip(powers, of_power / of_power.sum()):
        link = np.tanh(u ** (2.0**power) / 2.0 ** logs_t[:, None, None] / 2)
        lean = np.sign(z) * link * (1 - 2 * rates[some, None, None, None])
        of_blocks = np.log(np.maximum(1 + lean, 1e-6)).sum(-1)  # [rates, 81, 2]
        for step in (0.125, 0.5):
            kernel = norm.pdf(logs_t[:, None], logs_t, step)
            kernel = 0.99 * kernel / kernel.sum(0) + 0.01 / 81
            one = np.log(kernel @ start)  # before the first block
            # All pairs of temperatures of the two blocks.
            paths = (one + of_blocks[..., 0])[:, None] + (
                np.log(kernel) + of_blocks[..., 1][..., None]
            )
            total.append(logsumexp(paths, axis=(1, 2)) + np.log(weight / 2))
    total = logsumexp(total, axis=0)
    ours = np.asarray(found.log_likelihood, np.float64)
    likely = total > total.max() - 20
    apart = (ours[some] - total)[likely]
    np.testing.assert_allclose(apart, apart.mean(), atol=0.02)

    # Rate and interval are those of this log-likelihood.
    fine = np.linspace(0, 0.5, 100_001)
    inside = np.interp(fine, rates, ours) > ours.max() - chi2.ppf(0.95, 1) / 2
    ends = fine[inside][[0, -1]]
    np.testing.assert_allclose([found.lower, found.upper], ends, atol=1e-3)
    prior = beta.pdf(2 * rates, 2, 2)
    density = np.exp(ours - ours.max()) * prior
    certain = np.exp(ours[0] - ours.max()) > 9 * density.sum() / prior.sum()
    mode = 0 if certain else rates[density.argmax()]
    assert found.rate == pytest.approx(mode, abs=0.0051)


def test_no_flips_give_rate_zero():
    found = running.posterior(in_batches(labels(0, 8192, rate=0.0)))
    assert found.rate == found.lower == 0 and found.upper < 0.05 and found.identified


def test_the_rate_is_recovered_while_the_scale_drifts():
    errors = []
    for rate in (0.1, 0.3):
        found = drift.fit(drift.draw(5, drift.TARGET, rate=rate, datasets=10))
        assert found.identified.sum() >= 9
        assert ((found.lower <= rate) & (rate <= found.upper)).sum() >= 8
        errors.append(np.mean(np.abs(found.rate - rate)))
    assert max(errors) < 0.02


def test_the_temperature_is_that_of_the_last_block():
    for scale in (0.5, 3.0):
        z = labels(1, 16384, rate=0.1, scale=scale)
        grown = z * np.linspace(0.1, 1, len(z))
        found = running.posterior(in_batches(grown, size=256))
        assert 0.7 * scale < found.temperature < 1.4 * scale


def test_small_margins_do_not_identify_the_rate():
    nothing = running.posterior(running.no_counts())
    assert not nothing.identified
    np.testing.assert_allclose(nothing.rate, 0.25, atol=1e-6)
    small = running.posterior(in_batches(labels(0, 16384, rate=0.2, spread=0.05)))
    assert not small.identified and small.upper - small.lower > 0.35
    zeros = running.posterior(counted(np.zeros(64)))
    assert zeros.rate == pytest.approx(0.25, abs=0.01) and zeros.temperature > 0


def test_halves_with_different_rates_do_not_identify_one():
    halves = [labels(seed, 8192, rate=rate) for seed, rate in enumerate((0.05, 0.25))]
    found = running.posterior(in_batches(np.concatenate(halves)))
    assert found.upper - found.lower < 0.25 and not found.identified
    same = running.posterior(
        in_batches(np.random.default_rng(0).permutation(np.concatenate(halves)))
    )
    assert same.identified and same.lower < 0.15 < same.upper


def test_sharded_over_eight_devices():
    margins = jnp.asarray(labels(3, 64, rate=0.3), jnp.float32).reshape(2, 32)
    where = jnp.arange(64).reshape(2, 32) % 5 > 0

    def everything(margins, where):
        counts = running.count(running.no_counts(), margins, where=where)
        return counts, running.posterior(counts)

    eager = everything(margins, where)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, PartitionSpec(None, "data"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in (margins, where)]
        sharded = jax.jit(everything)(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, sharded, eager)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        counts = running.count(running.no_counts(jnp.float64), jnp.ones(3))
        found = running.posterior(counts)
        assert counts.table.dtype == found.rate.dtype == jnp.float64


@pytest.mark.slow
@pytest.mark.parametrize("rate", drift.RATES)
def test_intervals_cover_the_rate_while_the_scale_drifts(rate):
    """200 data sets that are not those of `python -m tests.noise.drift`."""
    case = dataclasses.replace(drift.TARGET, datasets=200)
    found = drift.fit(drift.draw(77, case, rate=rate, datasets=200))
    assert np.mean((found.lower <= rate) & (rate <= found.upper)) >= 0.9
    assert rate > 0.3 or np.mean(np.abs(found.rate - rate)) <= 0.02
