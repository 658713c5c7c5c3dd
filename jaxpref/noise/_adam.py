"""Adam for small problems, without a package for optimizers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def adam(
    gradient: Callable[[Any], Any], params: Any, *, steps: int, learning_rate: float
) -> Any:
    """Parameters after some steps of Adam (arXiv:1412.6980) on a full gradient."""
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(n, carry):
        params, mean, square = carry
        g = gradient(params)
        mean = jax.tree.map(lambda m, x: 0.9 * m + 0.1 * x, mean, g)
        square = jax.tree.map(lambda s, x: 0.99 * s + 0.01 * x * x, square, g)
        size = learning_rate * jnp.sqrt(1 - 0.99 ** (n + 1.0)) / (1 - 0.9 ** (n + 1.0))
        move = lambda p, m, s: p - size * m / (jnp.sqrt(s) + 1e-8)
        return jax.tree.map(move, params, mean, square), mean, square

    return jax.lax.fori_loop(0, steps, step, (params, zeros, zeros))[0]
