"""The posterior of a linear reward head, against scipy and dense computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit
from scipy.stats import norm

from jaxpref.noise import linear_head

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=4)
PAIRS = RNG.normal(size=(60, 4))
PAIRS *= np.where(RNG.random(60) < expit(PAIRS @ TRUTH), 1, -1)[:, None]
HEAD = np.array([0.7, -1.2, 0.4, 0.1])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss(head, weights, precision):
    return -weights @ log_expit(PAIRS @ head) + precision / 2 * head @ head


def numerical_hessian(function, at, step=1e-4):
    size, found = len(at), np.zeros((len(at), len(at)))
    basis = step * np.eye(size)
    for i in range(size):
        for j in range(size):
            a, b = basis[i], basis[j]
            found[i, j] = function(at + a + b) - function(at + a - b)
            found[i, j] += function(at - a - b) - function(at - a + b)
    return found / (4 * step**2)


def test_laplace_is_the_inverse_hessian_of_the_loss():
    found = linear_head.laplace(PAIRS, HEAD, prior_precision=0.5)
    of_head = lambda head: loss(head, np.ones(60), 0.5)
    covariance = np.linalg.inv(numerical_hessian(of_head, HEAD))
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(found.mean, HEAD)
    some = RNG.normal(size=(2, 3, 4))
    expected = [[x @ covariance @ x for x in row] for row in some]
    np.testing.assert_allclose(found.variance(jnp.array(some)), expected, rtol=1e-5)
    np.testing.assert_array_equal(found.variance(jnp.zeros((1, 4))), 0)


def test_without_pairs_the_posterior_is_the_prior():
    found = linear_head.laplace(np.zeros((0, 4)), HEAD, prior_precision=4.0)
    np.testing.assert_allclose(found.covariance, np.eye(4) / 4)


def test_the_prior_precision_maximizes_the_evidence():
    p = expit(PAIRS @ HEAD)
    information = (PAIRS * (p * (1 - p))[:, None]).T @ PAIRS

    def negative_evidence(log_precision):
        precision = np.exp(log_precision)
        _, logdet = np.linalg.slogdet(information + precision * np.eye(4))
        return (precision * HEAD @ HEAD + logdet - 4 * log_precision) / 2

    best = minimize_scalar(negative_evidence, bracket=(-2, 2), tol=1e-12).x
    found = linear_head.evidence_precision(PAIRS, HEAD)
    np.testing.assert_allclose(found, np.exp(best), rtol=1e-5)
    by_default = linear_head.laplace(PAIRS, HEAD).prior_precision
    np.testing.assert_array_equal(by_default, found)


@pytest.mark.parametrize("precision", [1e-3, 1.0])
def test_a_fitted_head_minimizes_the_loss(precision):
    weights = RNG.integers(0, 3, 60).astype(float)
    gradient = lambda w, *rest: precision * w - (weights * expit(-PAIRS @ w)) @ PAIRS
    args = (weights, precision)
    best = minimize(loss, np.zeros(4), args, jac=gradient, tol=1e-10).x
    found = linear_head.fit_head(PAIRS, weights, prior_precision=precision)
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-5)


def test_separable_pairs_have_a_finite_head():
    found = linear_head.fit_head(100 * abs(PAIRS), np.ones(60), prior_precision=1e-3)
    assert np.isfinite(found).all() and (100 * abs(PAIRS) @ found > 0).all()


@pytest.mark.slow
def test_resampled_heads_scatter_like_the_posterior():
    heads = linear_head.resampled_heads(
        np.tile(PAIRS, (5, 1)), jax.random.key(0), members=400, prior_precision=1.0
    )
    assert heads.shape == (400, 4)
    best = linear_head.fit_head(PAIRS, np.full(60, 5.0), prior_precision=1.0)
    spread = np.std(heads, axis=0)
    np.testing.assert_allclose(heads.mean(0), best, atol=4 * spread.max() / 20 + 0.05)
    posterior = linear_head.laplace(np.tile(PAIRS, (5, 1)), best, prior_precision=1.0)
    # Equal for correct models and many pairs.
    expected = np.sqrt(np.diag(posterior.covariance))
    np.testing.assert_allclose(spread, expected, rtol=0.35)


@pytest.mark.parametrize(("margin", "variance"), [(0.3, 0.0), (2.0, 4.0), (-1.0, 25.0)])
def test_the_expected_probability_is_close_to_the_integral(margin, variance):
    found = linear_head.expected_probability(margin, variance)
    if variance == 0:
        assert found == pytest.approx(expit(margin), abs=1e-12)
        return
    density = norm(margin, variance**0.5).pdf
    exact, _ = quad(lambda m: expit(m) * density(m), margin - 60, margin + 60)
    assert abs(found - exact) < 0.02


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match=r"head \[D\], got \(60, 4\) and \(3,\)"):
        linear_head.laplace(PAIRS, HEAD[:3])
    with pytest.raises(ValueError, match="prior_precision > 0"):
        linear_head.laplace(PAIRS, HEAD, prior_precision=0)
    with pytest.raises(ValueError, match="weights"):
        linear_head.fit_head(PAIRS, np.ones(3), prior_precision=1.0)
    with pytest.raises(ValueError, match="members >= 1"):
        linear_head.resampled_heads(
            PAIRS, jax.random.key(0), members=0, prior_precision=1.0
        )
    with pytest.raises(TypeError, match="floating"):
        linear_head.laplace(np.ones((2, 4), int), HEAD)
