"""Estimates of the six quantities: unbiasedness, masks, sharding, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpref.gradients.bvpo import Ingredients, ingredients, running, sketch

D = 3
RANDOM = np.random.default_rng(0)
ROOT = RANDOM.normal(size=(2 * D, 2 * D))
JOINT = ROOT @ ROOT.T
MEANS = RANDOM.normal(size=(2, D))
S_T, S_E = np.trace(JOINT[:D, :D]), np.trace(JOINT[D:, D:])
S_TE = np.trace(JOINT[:D, D:])
GAP = ((MEANS[1] - MEANS[0]) ** 2).sum()


def draws(repeats, count, seed=1):
    """Pairs of correlated draws, [repeats, count, D] of both kinds."""
    z = np.random.default_rng(seed).normal(size=(repeats, count, 2 * D)) @ ROOT.T
    z = z + MEANS.reshape(-1)
    return z[..., :D].astype(np.float32), z[..., D:].astype(np.float32)


def unbiased(found: Ingredients, **expected):
    """Checks means within four standard errors; quantities not given are 0."""
    for name, values in vars(found).items():
        values = np.asarray(values, np.float64)
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - expected.get(name, 0)) <= 4 * error, name
        assert error < 0.05 * max(abs(expected.get(name, 0)), 1)


@pytest.mark.parametrize(("k", "m"), [(2, 2), (3, 5), (8, 2)])
def test_unbiased_from_independent_draws(k, m):
    trace, _ = draws(40_000, k)
    _, empty = draws(40_000, m, seed=2)
    found = jax.vmap(lambda t, e: ingredients(t, e, trace_size=2, empty_size=4))
    unbiased(
        found(trace, empty),
        trace_variance=S_T / 2,
        empty_variance=S_E / 4,
        empty_bias_sq=GAP,
    )


@pytest.mark.parametrize("k", [2, 6])
def test_unbiased_from_paired_draws(k):
    found = jax.vmap(
        functools.partial(ingredients, paired=True, trace_size=k, empty_size=k)
    )(*draws(40_000, k))
    unbiased(
        found,
        trace_variance=S_T / k,
        empty_variance=S_E / k,
        covariance=S_TE / k,
        empty_bias_sq=GAP,
    )


def test_an_empty_gradient_that_is_not_random():
    """M = 1: its value is its mean; estimates of the squared bias may be negative."""
    trace, _ = draws(40_000, 2)
    close_by = (MEANS[0] + 0.1).astype(np.float32)[None]
    found = jax.vmap(lambda t: ingredients(t, close_by))(trace)
    unbiased(found, trace_variance=S_T, empty_bias_sq=0.01 * D)
    assert (found.empty_bias_sq < 0).any()


def test_unbiased_from_sketches():
    trace, _ = draws(20_000, 4)
    empty = MEANS[1].astype(np.float32)[None]

    def one(key, trace):
        short = jax.vmap(lambda g: sketch(g, key, size=5))
        return ingredients(short(trace), short(empty))

    found = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000), trace)
    unbiased(found, trace_variance=S_T, empty_bias_sq=GAP)


def test_a_tree_is_its_concatenation():
    trace, empty = (x[0] for x in draws(1, 5))
    split = lambda x: {"a": x[:, 0], "b": [x[:, None, 1:]]}
    for paired in (False, True):
        whole = ingredients(trace, empty, paired=paired)
        parts = ingredients(split(trace), split(empty), paired=paired)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, parts, whole)


def test_a_common_shift_changes_nothing():
    """The six quantities do not depend on mu."""
    trace, empty = (x[0] for x in draws(1, 5))
    with jax.enable_x64(True):
        trace, empty = (jnp.asarray(x, jnp.float64) for x in (trace, empty))
        here, there = ingredients(trace, empty), ingredients(trace + 5, empty + 5)
        assert here.trace_variance.dtype == jnp.float64
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9), here, there
        )


@pytest.mark.parametrize("paired", [False, True])
def test_masked_draws_are_ignored(paired):
    """Any count in one compiled function; masked draws hold NaN."""
    trace, empty = (x[0] for x in draws(1, 8))
    masked = jax.jit(
        lambda t, e, t_real, e_real: ingredients(
            t, e, paired=paired, trace_where=t_real, empty_where=e_real
        )
    )
    for count in (2, 5, 8):
        t_real = np.arange(8) < count
        e_real = t_real[::-1] if not paired else t_real | (np.arange(8) > 6)
        both = t_real & e_real
        kept = (trace[both], empty[both]) if paired else (trace[t_real], empty[e_real])
        junk = [
            np.where(real[:, None], x, np.nan)
            for real, x in ((t_real, trace), (e_real, empty))
        ]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(
            close, masked(*junk, t_real, e_real), ingredients(*kept, paired=paired)
        )


def test_both_kinds_of_pairs_in_one_array():
    values = draws(1, 9)[0][0]
    kind = np.arange(9) % 2 == 0
    found = ingredients(values, values, trace_where=kind, empty_where=~kind)
    apart = ingredients(values[kind], values[~kind])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, apart)


@pytest.mark.parametrize(("k", "m"), [(1, 4), (0, 4), (4, 1), (4, 0)])
def test_too_few_real_draws_give_nan(k, m):
    """NaN, which `running` skips; one of several slots has no variance."""
    trace, empty = (x[0] for x in draws(1, 4))
    found = ingredients(
        trace, empty, trace_where=np.arange(4) < k, empty_where=np.arange(4) < m
    )
    assert np.isnan(found.empty_bias_sq)
    assert np.isnan(found.trace_variance) == (k < 2)
    assert np.isnan(found.empty_variance) == (m < 2)
    average = running(decay=0.5)
    alpha, state = average.update(found, average.init())
    assert alpha == 0.5 and state.weight == 0
    lone = ingredients(trace, empty[:1], empty_where=np.array([False]))
    assert np.isnan(lone.empty_bias_sq) and lone.empty_variance == 0


def test_sharded_over_eight_devices():
    """Draws sharded over the devices, and parameters sharded over them."""
    trace, empty = (x[0] for x in draws(1, 16))
    wide = [np.concatenate([x] * 4, axis=1)[:, :8] for x in (trace, empty)]
    real = np.arange(16) % 3 > 0

    def both(trace, empty, real):
        each = functools.partial(ingredients, trace_where=real, empty_where=real)
        return (
            ingredients(trace, empty),
            each(trace, empty),
            each(trace, empty, paired=True, trace_size=real.sum()),
        )

    eager = both(*wide, real)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for spec in ((("data", "fsdp"),), ("data", "fsdp"), (None, ("data", "fsdp"))):
        sharding = jax.NamedSharding(mesh, PartitionSpec(*spec))
        rows = jax.NamedSharding(mesh, PartitionSpec(spec[0]))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, sharding) for x in wide]
            found = jax.jit(both)(*placed, jax.device_put(real, rows))
        jax.tree.map(close, found, eager)


def test_invalid_draws_are_rejected():
    ones = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="at least 2 trace draws .* got 1 and 4"):
        ingredients(ones[:1], ones)
    with pytest.raises(ValueError, match="paired, got 4 and 3"):
        ingredients(ones, ones[:3], paired=True)
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 2\)"):
        ingredients(ones, ones[:, :2])
    with pytest.raises(ValueError, match="one structure"):
        ingredients({"a": ones}, {"b": ones})
    with pytest.raises(ValueError, match="one structure"):
        ingredients({}, {})
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 3\), \(3,\)"):
        ingredients((ones, ones[:3, 0]), (ones, ones[:, 0]))
    with pytest.raises(ValueError, match=r"got \(\) and \(\)"):
        ingredients(jnp.ones(()), jnp.ones(()))
    with pytest.raises(ValueError, match=r"empty_where of shape \(4,\), got \(3,\)"):
        ingredients(ones, ones, empty_where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="trace_size > 0"):
        ingredients(ones, ones, trace_size=0)
    with pytest.raises(TypeError, match="floating point"):
        ingredients(ones.astype(int), ones)
