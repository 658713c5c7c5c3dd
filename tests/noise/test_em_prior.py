"""The pooled prior of reliabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxpref.noise import em
from tests.noise.simulations import votes


def many(seed, *, annotators=150, each=30, shape=(18, 4)):
    truth = np.random.default_rng(seed).beta(*shape, annotators)
    who = np.repeat(np.arange(annotators), each)
    data = votes(seed, reliability=truth, items=len(who), annotators=who, spread=2.0)
    return truth, jnp.asarray(data.margins, jnp.float32), jnp.asarray(who)


def test_pooling_beats_separate_fits_and_a_guess():
    """Root mean squared error over 150 annotators with 30 votes, three draws."""
    for seed in range(3):
        truth, margins, who = many(seed)
        found = em.fit(margins, who, num_annotators=150)
        a, b = found.prior
        error = lambda fit, truth=truth: np.sqrt(
            np.mean((fit.reliability - truth) ** 2)
        )
        options = {"num_annotators": 150}
        alone = em.fit(margins, who, prior=(0, 0), **options)
        guessed = em.fit(margins, who, prior=em.PRIOR, **options)
        assert error(found) < 0.75 * error(alone)
        assert error(found) < error(guessed)
        np.testing.assert_allclose(a / (a + b), 17 / 20, atol=0.05)
        assert 8 < a + b < 60
        inside = (found.lower <= truth) & (truth <= found.upper)
        assert inside.mean() > 0.9


def test_a_single_annotator_is_not_pooled():
    """The prior is negligible, so the interval is that of the votes alone."""
    margins = jnp.asarray(votes(3, reliability=0.8, items=500).margins, jnp.float32)
    who = jnp.full(500, -1)
    found = em.fit(margins, who, num_annotators=1)
    assert sum(found.prior) < 1
    alone = em.fit(margins, who, num_annotators=1, prior=(0, 0))
    np.testing.assert_allclose(found.lower, alone.lower, atol=0.01)
    few = em.fit(jnp.ones(3), jnp.full(3, -1), num_annotators=1)
    assert np.isfinite(few.reliability).all() and sum(few.prior) < 1
    nobody = em.pooled_prior(
        jnp.ones(3), jnp.zeros(3, int), num_annotators=2, where=jnp.zeros(3, bool)
    )
    assert np.isfinite(nobody).all() and sum(nobody) < 1


def test_sharded_over_eight_devices():
    _, margins, who = many(4, annotators=8, each=16)
    eager = em.pooled_prior(margins, who, num_annotators=8)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in (margins, who)]
        pooled = functools.partial(em.pooled_prior, num_annotators=8)
        sharded = jax.jit(pooled)(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, sharded, eager)
