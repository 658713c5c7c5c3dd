"""Lengths in DPO, and the likelihood that discounts them."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpref import losses
from tests.losses.arrays import PAIRS, arrays_of
from tests.losses.rows_length import ROWS
from tests.losses.test_battery import on_device

LD_DPO = next(row for row in ROWS if row.loss is losses.ld_dpo)
R_DPO = next(row for row in ROWS if row.loss is losses.r_dpo)


def test_one_token_needs_no_normalizing():
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(R_DPO)[:4], jnp.float64)
        one = jnp.ones(PAIRS, jnp.int32)
        ours = losses.ln_dpo(*arrays, one, one, beta=0.1)
        np.testing.assert_allclose(ours, losses.dpo(*arrays), rtol=1e-12)


def test_ln_dpo_counts_the_mean_and_not_the_sum():
    """Answers repeated end to end change nothing."""
    with jax.enable_x64(True):
        *arrays, chosen, rejected = on_device(arrays_of(R_DPO), jnp.float64)
        once = losses.ln_dpo(*arrays, chosen, rejected)
        doubled = [2 * array for array in arrays]
        twice = losses.ln_dpo(*doubled, 2 * chosen, 2 * rejected)
    np.testing.assert_allclose(twice, once, rtol=1e-12)


def test_r_dpo_learns_less_from_chosen_answers_that_are_longer():
    zero, lengths = jnp.zeros(3), jnp.array([10, 20, 40])
    same = jnp.full(3, 20)
    loss = lambda first: jnp.sum(
        losses.r_dpo(first, zero, zero, zero, lengths, same, alpha=0.05)
    )
    short, level, long = jax.grad(loss)(zero)
    assert short < level < long < 0
    np.testing.assert_allclose(level, -0.05, rtol=1e-6)  # DPO's


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.float32, jnp.bfloat16])
def test_r_dpo_takes_lengths_of_any_type(dtype):
    zero = jnp.zeros(1)
    lengths = [jnp.array([n], dtype) for n in (10, 50)]
    loss = losses.r_dpo(zero, zero, zero, zero, *lengths, alpha=0.05)
    np.testing.assert_allclose(loss, np.logaddexp(0, 2), rtol=1e-6)


def test_ld_dpo_of_answers_of_one_length_is_dpo():
    """Then the prefix is everything, whatever alpha."""
    arrays = on_device(arrays_of(LD_DPO)[:4], jnp.float32)
    for alpha in (0.0, 0.3, 1.0):
        loss = losses.ld_dpo(*arrays, *arrays, alpha=alpha)
        np.testing.assert_allclose(loss, losses.dpo(*arrays), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ld_dpo_is_dpo_of_discounted_likelihoods(alpha):
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(LD_DPO), jnp.float64)
        discounted = [
            losses.length_desensitized(whole, prefix, alpha=alpha)
            for whole, prefix in zip(arrays[:4], arrays[4:])
        ]
        ours, expected = losses.ld_dpo(*arrays, alpha=alpha), losses.dpo(*discounted)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


def tokens(seed=0, pairs=PAIRS, longest=12):
    """Token log-probs [N, T] and lengths [N] of one side, and the other's lengths."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(1, longest + 1, (2, pairs))
    return rng.uniform(-3, 0, (pairs, longest)), lengths, others


def sums(token_logps, counts):
    return np.stack([row[:count].sum() for row, count in zip(token_logps, counts)])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_length_desensitized_from_tokens(alpha):
    """Token by token: weight 1 up to the shorter answer's length, alpha beyond."""
    token_logps, lengths, others = tokens()
    expected = []
    for row, length, other in zip(token_logps, lengths, others):
        weights = [1.0 if t < other else alpha for t in range(length)]
        expected.append(np.dot(weights, row[:length]))
    whole = sums(token_logps, lengths)
    prefix = sums(token_logps, np.minimum(lengths, others))
    with jax.enable_x64(True):
        exact = losses.length_desensitized(*on_device([whole, prefix], jnp.float64),
                                           alpha=alpha)  # fmt: skip
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, expected, rtol=1e-12)
    single = losses.length_desensitized(*on_device([whole, prefix], jnp.float32),
                                        alpha=alpha)  # fmt: skip
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


def test_length_desensitized_under_jit_and_shards():
    rng = np.random.default_rng(0)
    whole, prefix = on_device(-rng.uniform(0, 9, (2, PAIRS)), jnp.float32)
    discount = functools.partial(losses.length_desensitized, alpha=0.25)
    eager = discount(whole, prefix)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(jax.jit(discount)(whole, prefix), eager)
    close(jax.vmap(discount)(whole[:, None], prefix[:, None])[:, 0], eager)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(("data", "fsdp"))
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec))
        sharded = jax.jit(discount)(place(whole), place(prefix))
        assert jax.typeof(sharded).sharding.spec == spec
    close(sharded, eager)
    gradients = jax.grad(lambda *a: jnp.sum(discount(*a)), argnums=(0, 1))(
        whole, prefix
    )
    close(gradients[0], 0.25)
    close(gradients[1], 0.75)


def test_length_desensitized_at_extremes():
    logps = jnp.array([-1e4, 0.0, jnp.nan, -jnp.inf], jnp.bfloat16)
    out = losses.length_desensitized(logps, jnp.zeros(4, jnp.bfloat16), alpha=0.5)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(np.isfinite(out), [True, True, False, False])
    np.testing.assert_allclose(out[:2], [-5e3, 0], rtol=5e-3)


# Invalid arguments.


def test_length_desensitized_refuses_wrong_arrays():
    discount = inspect.unwrap(losses.length_desensitized)
    logps = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"logps \(3,\), prefix_logps \(2,\)"):
        discount(logps, logps[:2], alpha=0.5)
    with pytest.raises(TypeError, match="prefix_logps to be floating point"):
        discount(logps, jnp.zeros(3, jnp.int32), alpha=0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_discount_out_of_range_is_refused(alpha):
    logps = jnp.zeros(3)
    with pytest.raises(ValueError, match=rf"alpha in \[0, 1\], got {alpha}"):
        losses.length_desensitized(logps, logps, alpha=alpha)
    with pytest.raises(ValueError, match=rf"alpha in \[0, 1\], got {alpha}"):
        losses.ld_dpo(*[logps] * 8, alpha=alpha)


def test_price_out_of_range_is_refused():
    logps = jnp.zeros(3)
    with pytest.raises(ValueError, match="alpha >= 0 and finite, got -0.1"):
        losses.r_dpo(*[logps] * 6, alpha=-0.1)
