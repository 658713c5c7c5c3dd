"""Dropout of a reward head with one mask for the answers to a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.noise.dropout import dropout_rewards, record_keys

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(5, 3, 16)).astype(np.float32)
HEAD = RNG.normal(size=16).astype(np.float32)
RECORDS = np.array([3, 2**32 - 1, 0, 7, 12], np.uint32)
KEYS = record_keys(1, RECORDS)


def test_equal_answers_do_not_differ():
    equal = np.repeat(FEATURES[:, :1], 2, axis=1)
    found = np.asarray(dropout_rewards(equal, HEAD, KEYS, rate=0.5))
    assert found.std(axis=0).min() > 0  # of the rewards
    np.testing.assert_array_equal(found[..., 0], found[..., 1])


def test_margins_scatter_around_the_margin():
    """Mean and variance of a sum of scaled Bernoulli variables, by hand."""
    rate, passes = 0.25, 4000
    found = dropout_rewards(FEATURES, HEAD, KEYS, rate=rate, passes=passes)
    assert found.shape == (passes, 5, 3)
    margins = np.asarray(found[..., 0] - found[..., 1], np.float64)
    terms = (FEATURES[:, 0] - FEATURES[:, 1]) * HEAD
    spread = np.sqrt(rate / (1 - rate) * (terms**2).sum(1))
    # Four standard errors of a mean and of a standard deviation.
    error = abs(margins.mean(0) - terms.sum(1))
    np.testing.assert_array_less(error, 4 * spread / passes**0.5)
    np.testing.assert_allclose(margins.std(0), spread, rtol=4 / passes**0.5)
    between = np.corrcoef(margins.T)[~np.eye(5, dtype=bool)]
    assert abs(between).max() < 4.5 / passes**0.5


def test_masks_depend_on_seed_and_record_alone():
    whole = dropout_rewards(FEATURES, HEAD, KEYS)
    order = np.array([4, 0, 2])
    some = dropout_rewards(FEATURES[order], HEAD, record_keys(1, RECORDS[order]))
    np.testing.assert_array_equal(some, whole[:, order])
    other = dropout_rewards(FEATURES, HEAD, record_keys(2, RECORDS))
    assert not np.any(np.isclose(other, whole).all(0))


def test_no_dropout_is_the_reward():
    found = dropout_rewards(FEATURES, HEAD, KEYS, rate=0.0, passes=2)
    np.testing.assert_allclose(found, [FEATURES @ HEAD] * 2, rtol=1e-5, atol=1e-5)
    for wrong in ({"rate": 1.0}, {"rate": -0.1}, {"passes": 0}):
        with pytest.raises(ValueError, match="Expected (rate|passes)"):
            dropout_rewards(FEATURES, HEAD, KEYS, **wrong)
    with pytest.raises(TypeError, match="floating"):
        dropout_rewards(jnp.ones((1, 2, 3), int), HEAD[:3], KEYS[:1])


def test_half_precision_features_give_float32():
    half = jnp.asarray(FEATURES, jnp.bfloat16)
    assert dropout_rewards(half, HEAD, KEYS).dtype == jnp.float32
    assert jax.eval_shape(dropout_rewards, FEATURES, HEAD, KEYS).shape == (10, 5, 3)
