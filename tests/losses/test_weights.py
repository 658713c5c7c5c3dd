"""Properties of WPO's weights."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import logsumexp

from jaxpref import losses

VOCABULARY = 7


def answers(seed=0):
    """Logits [16, 6, V], tokens [16, 6] and a mask with an empty answer."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (16, 6, VOCABULARY))
    tokens = rng.integers(0, VOCABULARY, (16, 6))
    mask = np.arange(6) < np.arange(16)[:, None] % 7
    return logits, tokens, mask


def token_arrays(logits, tokens):
    logps = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]
    return logps, losses.log_collisions(logits)


def oracle(logits, tokens, mask):
    """The mean over tokens of log pi(y) / sum pi^2, token by token."""
    weights = np.zeros(len(tokens))
    for i, (rows, own, real) in enumerate(zip(logits, tokens, mask)):
        terms = []
        for row, token, counts in zip(rows, own, real):
            probabilities = np.exp(row - logsumexp(row))
            if counts:
                terms.append(np.log(probabilities[token] / (probabilities**2).sum()))
        weights[i] = np.mean(terms) if terms else 0
    return weights


def test_log_weights_match_the_paper():
    logits, tokens, mask = answers()
    expected = oracle(logits, tokens, mask)
    with jax.enable_x64(True):
        arrays = token_arrays(jnp.asarray(logits), jnp.asarray(tokens))
        exact = losses.wpo_log_weights(*arrays, jnp.asarray(mask))
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-13)
    arrays = token_arrays(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens))
    for log_weights in (losses.wpo_log_weights, jax.jit(losses.wpo_log_weights)):
        single = log_weights(*arrays, jnp.asarray(mask))
        np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)
    assert mask.any(axis=-1).any() and not mask[0].any() and single[0] == 0


def test_padding_may_hold_anything():
    logits, tokens, mask = answers()
    logps, collisions = token_arrays(jnp.asarray(logits), jnp.asarray(tokens))
    mask = jnp.asarray(mask)
    total = lambda a, b: losses.wpo_log_weights(a, b, mask).sum()
    clean = jax.grad(total, argnums=(0, 1))(logps, collisions)
    dirty = jax.grad(total, argnums=(0, 1))(
        jnp.where(mask, logps, jnp.nan), jnp.where(mask, collisions, -jnp.inf)
    )
    for ours, theirs in zip(dirty, clean):
        np.testing.assert_array_equal(ours, theirs)


def test_a_uniform_policy_has_weight_1():
    """P12: for any tokens, and then the loss is DPO's."""
    logits, tokens, mask = answers()
    uniform = token_arrays(jnp.zeros(logits.shape), jnp.asarray(tokens))
    log_weights = losses.wpo_log_weights(*uniform, jnp.asarray(mask))
    np.testing.assert_allclose(log_weights, 0, atol=1e-6)
    four = [jnp.linspace(-9, -1, 16) * scale for scale in (1, 2, 3, 0.5)]
    ours = losses.wpo(*four, log_weights, log_weights, beta=0.1)
    np.testing.assert_allclose(ours, losses.dpo(*four, beta=0.1), rtol=2e-6)


def test_wpo_is_the_product_of_the_weights_capped_at_1():
    four = [jnp.linspace(-9, -1, 3) * scale for scale in (1, 2, 3, 0.5)]
    chosen, rejected = jnp.array([-1.0, 2.0, 5e3]), jnp.array([-0.5, -3.0, 1.0])
    ours = losses.wpo(*four, chosen, rejected)
    plain = losses.dpo(*four, beta=0.01)
    np.testing.assert_allclose(ours, plain * np.exp([-1.5, -1.0, 0.0]), rtol=2e-6)
    # The weights have no gradient.
    total = lambda c, r: losses.wpo(*four, c, r).sum()
    for gradient in jax.grad(total, argnums=(0, 1))(chosen, rejected):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_collisions_at_extremes(dtype):
    logits = jnp.array([[1e4, -1e4, 0], [3e4, 3e4, 3e4], [0, -jnp.inf, 0]], dtype)
    value = losses.log_collisions(logits)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, -np.log([1, 3, 2]), atol=1e-6)
    gradient = jax.grad(lambda z: losses.log_collisions(z).sum())(logits[:2])
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_sharded_equals_unsharded():
    logits, tokens, mask = answers()
    arrays = (
        *token_arrays(jnp.asarray(logits), jnp.asarray(tokens)),
        jnp.asarray(mask),
    )
    alone = losses.wpo_log_weights(*arrays)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec))
        sharded = jax.jit(losses.wpo_log_weights)(*map(place, arrays))
        assert jax.typeof(sharded).sharding.spec == spec
        collisions = jax.jit(losses.log_collisions)(place(jnp.asarray(logits)))
        assert jax.typeof(collisions).sharding.spec == PartitionSpec("data", None)
    np.testing.assert_allclose(sharded, alone, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(collisions, arrays[1], rtol=2e-6, atol=1e-6)


def test_invalid_arguments_are_rejected():
    log_weights = inspect.unwrap(losses.wpo_log_weights)
    log_collisions = inspect.unwrap(losses.log_collisions)
    tokens, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(TypeError, match="token_logps to be floating point, got int32"):
        log_weights(jnp.zeros((2, 3), int), tokens, mask)
    with pytest.raises(TypeError, match="mask to be boolean, got float32"):
        log_weights(tokens, tokens, tokens)
    with pytest.raises(ValueError, match=r"token_log_collisions \(2, 2\)"):
        log_weights(tokens, tokens[:, :2], mask)
    with pytest.raises(ValueError, match=r"mask \(2, 2\)"):
        log_weights(tokens, tokens, mask[:, :2])
    with pytest.raises(ValueError, match="axis of positions"):
        log_weights(jnp.zeros(()), jnp.zeros(()), jnp.ones((), bool))
    with pytest.raises(TypeError, match="logits to be floating point"):
        log_collisions(jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match="axis of tokens"):
        log_collisions(jnp.zeros(()))
