"""From tokens to completions."""

import decimal
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import log_softmax

from jaxpref import losses
from tests.losses.meshes import sharded


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


def test_sum_by_completion_rejects_invalid_arguments():
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


def layout(seed=0):
    """Padding with NaN, and owners in a mixed order."""
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=(2, 8, 3, 5)) * 2**8) / 2**8
    owner = rng.integers(-1, 4, size=values.shape)
    return values, owner, rng


def test_sum_weighted_by_completion():
    values, owner, rng = layout()
    weights = np.round(rng.uniform(0, 2, size=values.shape) * 2**6) / 2**6
    expected = np.zeros((2, 8, 4))
    for index in np.ndindex(values.shape):
        if owner[index] >= 0:
            expected[index[:2] + (owner[index],)] += weights[index] * values[index]
    poison = lambda x: jnp.asarray(np.where(owner < 0, np.nan, x), jnp.float32)
    arrays = poison(values), poison(weights), jnp.asarray(owner, jnp.int32)
    total = functools.partial(losses.sum_weighted_by_completion, num_completions=4)
    np.testing.assert_allclose(total(*arrays), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        total(arrays[0], jnp.ones_like(arrays[0]), arrays[2]),
        losses.sum_by_completion(arrays[0], arrays[2], num_completions=4),
    )

    def both(v, w, o):
        summed = lambda v, w: jnp.sum(total(v, w, o)[..., 1])
        return total(v, w, o), *jax.grad(summed, argnums=(0, 1))(v, w)

    for sums, to_values, to_weights in (both(*arrays), sharded(both, *arrays, axis=1)):
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(to_values, np.where(owner == 1, weights, 0))
        np.testing.assert_array_equal(to_weights, np.where(owner == 1, values, 0))
    half = arrays[0].astype(jnp.bfloat16), arrays[1].astype(jnp.bfloat16)
    assert total(*half, arrays[2]).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (values, weights)]
        exact = total(*wide, arrays[2])
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, expected, rtol=1e-13)


def test_sum_prefix_by_completion():
    values, owner, rng = layout(1)
    prefix = rng.integers(0, 8, size=(2, 8, 4))
    expected, seen = np.zeros((2, 8, 4)), np.zeros((2, 8, 4), int)
    counted = np.zeros(values.shape)
    for index in np.ndindex(values.shape):
        slot = index[:2] + (owner[index],)
        if owner[index] >= 0 and seen[slot] < prefix[slot]:
            expected[slot] += values[index]
            counted[index] = 1
        if owner[index] >= 0:
            seen[slot] += 1
    arrays = (
        jnp.asarray(np.where(owner < 0, np.nan, values), jnp.float32),
        jnp.asarray(owner, jnp.int32),
        jnp.asarray(prefix, jnp.int32),
    )
    total = functools.partial(losses.sum_prefix_by_completion, num_completions=4)

    def both(v, o, n):
        return total(v, o, n), jax.grad(lambda v: jnp.sum(total(v, o, n)))(v)

    for sums, gradient in (both(*arrays), sharded(both, *arrays, axis=1)):
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient, counted)
    np.testing.assert_array_equal(
        total(*arrays[:2], jnp.full((2, 8, 4), 99)),
        losses.sum_by_completion(*arrays[:2], num_completions=4),
    )
    assert not total(*arrays[:2], jnp.zeros((2, 8, 4), jnp.int32)).any()
    # Rows are independent: the same under any leading axes.
    np.testing.assert_array_equal(jax.vmap(jax.vmap(total))(*arrays), total(*arrays))
    assert total(arrays[0].astype(jnp.float16), *arrays[1:]).dtype == jnp.float32


def test_sums_reject_invalid_arguments():
    logps, owner = jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32)
    weighted = inspect.unwrap(losses.sum_weighted_by_completion)
    with pytest.raises(ValueError, match=r"one shape, got .*token_weights \(3,\)"):
        weighted(logps, logps[0], owner, num_completions=2)
    with pytest.raises(TypeError, match="token_weights to be floating"):
        weighted(logps, owner, owner, num_completions=2)
    prefix = inspect.unwrap(losses.sum_prefix_by_completion)
    with pytest.raises(ValueError, match=r"of shape \(2,\), got \(3,\)"):
        prefix(logps, owner, jnp.zeros(3, jnp.int32), num_completions=2)
    with pytest.raises(TypeError, match="prefix_lengths to be integer"):
        prefix(logps, owner, jnp.zeros(2), num_completions=2)
    with pytest.raises(ValueError, match="num_completions >= 1, got 0"):
        prefix(logps, owner, jnp.zeros(2, jnp.int32), num_completions=0)


def test_average_logps():
    logps, lengths = jnp.asarray([-12.0, -3.0, 0.0]), jnp.asarray([4, 1, 0])
    np.testing.assert_array_equal(losses.average_logps(logps, lengths), [-3, -3, 0])
    assert losses.average_logps(logps.astype(jnp.bfloat16), lengths).dtype == "float32"
    gradient = jax.grad(lambda x: losses.average_logps(x, lengths).sum())(logps)
    np.testing.assert_array_equal(gradient, [0.25, 1, 1])
    with pytest.raises(ValueError, match=r"lengths \(2,\)"):
        inspect.unwrap(losses.average_logps)(logps, lengths[:2])
    with pytest.raises(TypeError, match="logps to be floating"):
        inspect.unwrap(losses.average_logps)(lengths, lengths)


ODDS = np.array([-1e4, -800.0, -30.0, -2.0, -0.7, -0.69, -0.5, -1e-3, -2e-6])


def test_log_odds():
    """Against 60-digit arithmetic, on both sides of -log 2 and at both ends."""
    with decimal.localcontext() as digits:
        digits.prec = 60
        averages = [decimal.Decimal(float(a)) for a in ODDS]
        exact = [float(a - (1 - a.exp()).ln()) for a in averages]
        derivatives = [float(1 / (1 - a.exp())) for a in averages]
    derivative = jax.grad(lambda a: losses.log_odds(a).sum())
    with jax.enable_x64(True):
        wide = jnp.asarray(ODDS, jnp.float64)
        np.testing.assert_allclose(losses.log_odds(wide), exact, rtol=1e-13)
        np.testing.assert_allclose(derivative(wide), derivatives, rtol=1e-12)
    single = jnp.asarray(ODDS, jnp.float32)
    np.testing.assert_allclose(losses.log_odds(single), exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(derivative(single), derivatives, rtol=1e-5)
    certain = jnp.asarray([-1e-8, 0.0, 3.0, 1e4])
    np.testing.assert_allclose(losses.log_odds(certain), np.log(1e6), rtol=1e-5)
    np.testing.assert_array_equal(derivative(certain), 0)
    np.testing.assert_allclose(
        jax.nn.sigmoid(losses.log_odds(single)), np.exp(ODDS), rtol=1e-6, atol=1e-30
    )
    with pytest.raises(TypeError, match="average_logps to be floating"):
        inspect.unwrap(losses.log_odds)(jnp.zeros(2, int))


def test_token_kls():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 8, 3, 11)) * 4
    policy, reference = log_softmax(logits, axis=-1)
    expected = (np.exp(reference) * (reference - policy)).sum(-1)
    with jax.enable_x64(True):
        exact = losses.token_kls(jnp.asarray(policy), jnp.asarray(reference))
        np.testing.assert_allclose(exact, expected, rtol=1e-12)
    tables = jnp.asarray(policy, jnp.float32), jnp.asarray(reference, jnp.float32)
    single = losses.token_kls(*tables)
    np.testing.assert_allclose(single, expected, rtol=1e-4)
    assert (single >= 0).all()
    assert (
        losses.token_kls(*(t.astype(jnp.bfloat16) for t in tables)).dtype == "float32"
    )
    np.testing.assert_array_equal(losses.token_kls(tables[0], tables[0]), 0)
    np.testing.assert_allclose(
        sharded(losses.token_kls, *tables, axis=1), single, rtol=1e-6
    )

    # In logits, the gradient is the policy minus the reference.
    loss = lambda z: losses.token_kls(jax.nn.log_softmax(z), tables[1]).sum()
    gradient = jax.grad(loss)(jnp.asarray(logits[0], jnp.float32))
    np.testing.assert_allclose(
        gradient, np.exp(policy) - np.exp(reference), atol=1e-6, rtol=1e-4
    )


def test_token_kls_of_impossible_tokens():
    half = jnp.log(jnp.asarray([0.5, 0.5, 0.0]))
    policy = jnp.log(jnp.asarray([0.25, 0.5, 0.25]))
    divergence, derivative = jax.value_and_grad(losses.token_kls)(policy, half)
    np.testing.assert_allclose(divergence, 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(derivative, [-0.5, -0.5, 0])
    np.testing.assert_array_equal(losses.token_kls(half, half), 0)
    # The KL is infinite if the policy excludes a token of the reference.
    assert losses.token_kls(half, policy) == jnp.inf
    with pytest.raises(ValueError, match="one shape"):
        inspect.unwrap(losses.token_kls)(policy, policy[:2])
