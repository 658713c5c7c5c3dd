"""From tokens to completions."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpref import losses


def test_sum_by_completion():
    rng = np.random.default_rng(0)
    logps = rng.normal(size=(2, 8, 3, 5))
    owner = rng.integers(-1, 4, size=logps.shape)
    expected = np.zeros((2, 8, 4))
    for a, r, q, p in np.ndindex(logps.shape):
        if owner[a, r, q, p] >= 0:
            expected[a, r, owner[a, r, q, p]] += logps[a, r, q, p]
    poisoned = jnp.asarray(np.where(owner < 0, np.nan, logps), jnp.float32)
    owner = jnp.asarray(owner, jnp.int32)
    total = functools.partial(losses.sum_by_completion, num_completions=4)
    np.testing.assert_allclose(total(poisoned, owner), expected, rtol=1e-5, atol=1e-6)
    assert total(poisoned.astype(jnp.bfloat16), owner).dtype == jnp.float32

    gradient = jax.grad(lambda x: jnp.sum(total(x, owner)[..., 1]))(poisoned)
    np.testing.assert_array_equal(gradient, owner == 1)

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(None, ("data", "fsdp"))
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec))
        both = jax.jit(jax.value_and_grad(lambda x, o: jnp.sum(total(x, o)[..., 1])))
        value, sharded_gradient = both(place(poisoned), place(owner))
        sums = jax.jit(total)(place(poisoned), place(owner))
        assert jax.typeof(sums).sharding.spec[1] == ("data", "fsdp")
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, expected[..., 1].sum(), rtol=1e-5)
    np.testing.assert_array_equal(sharded_gradient, gradient)


def test_sum_by_completion_refuses_wrong_use():
    total = inspect.unwrap(losses.sum_by_completion)
    logps, owner = jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"one shape .* \(2, 3\), completions \(3,\)"):
        total(logps, owner[0], num_completions=2)
    with pytest.raises(ValueError, match="one shape"):
        total(logps[0], owner[0], num_completions=2)
    with pytest.raises(ValueError, match="num_completions >= 1, got 0"):
        total(logps, owner, num_completions=0)
    with pytest.raises(TypeError, match="completions to be integer"):
        total(logps, logps, num_completions=2)
    with pytest.raises(TypeError, match="token_logps to be floating"):
        total(owner, owner, num_completions=2)
