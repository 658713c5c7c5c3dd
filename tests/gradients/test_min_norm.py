"""The combination of gradients with the smallest norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxpref.gradients.min_norm import min_norm_shares

solve = jax.jit(min_norm_shares)


def smallest_norm(gradients):
    """From a general solver; with several starts, since it may stop early."""
    count = len(gradients)
    norm = lambda x: np.sum((x @ gradients) ** 2)
    jacobian = lambda x: 2 * gradients @ (x @ gradients)
    one = {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like}
    starts = [np.full(count, 1 / count), *(0.1 / count + 0.9 * np.eye(count))]
    return min(
        minimize(
            norm,
            start / start.sum(),
            jac=jacobian,
            bounds=[(0, 1)] * count,
            constraints=one,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        ).fun
        for start in starts
    )


@pytest.mark.parametrize(("count", "size"), [(2, 3), (3, 2), (5, 4), (8, 12)])
def test_the_norm_is_that_of_a_general_solver(count, size):
    rng = np.random.default_rng(count)
    with jax.enable_x64(True):
        for n in range(12):
            # Around a common direction, so that the norm is not always 0.
            scales = 10 ** rng.uniform(-1, 1, (count, 1))
            gradients = scales * (rng.normal(size=(count, size)) + n / 6)
            shares = np.asarray(solve(jnp.asarray(gradients @ gradients.T)))
            assert shares.min() >= 0 and shares.sum() == pytest.approx(1, abs=1e-12)
            found = shares @ gradients
            largest = np.sum(gradients**2, 1).max()
            assert found @ found <= smallest_norm(gradients) + 2e-6 * largest
            # No objective gets worse along the combination.
            assert (gradients @ found >= found @ found - 2e-6 * largest).all()


def test_of_two_gradients_it_is_known_in_closed_form():
    g = np.array([[3.0, 0], [-1, 0]], np.float32)  # they contradict each other
    np.testing.assert_allclose(solve(g @ g.T), [0.25, 0.75], atol=1e-6)
    g = np.array([[3.0, 0], [1, 1]], np.float32)
    shares = np.asarray(solve(g @ g.T))
    # On the line between them, the point closest to 0: |g_2|^2 = <g_2, g_1> - 1.
    away = g[0] - g[1]
    assert shares[0] == 0 and (shares @ g) @ away >= 0
    g = np.array([[3.0, 0], [0, 1]], np.float32)
    np.testing.assert_allclose(solve(g @ g.T), [0.1, 0.9], atol=1e-6)
    same = np.ones((2, 2), np.float32)
    assert solve(same).sum() == 1


def test_gradients_that_are_missing_get_nothing():
    g = np.array([[0.0, 0], [2, 0], [0, 0], [0, 1]], np.float32)
    where = np.array([False, True, False, True])
    found = np.asarray(solve(g @ g.T, where=where))
    np.testing.assert_allclose(found, [0, 0.2, 0, 0.8], atol=1e-6)
    only = np.asarray(solve(g @ g.T, where=np.array([False, True, False, False])))
    np.testing.assert_array_equal(only, [0, 1, 0, 0])
    none = solve(g @ g.T, where=np.zeros(4, bool))
    np.testing.assert_array_equal(none, 0)
