"""The combination of several gradients with the smallest norm (MGDA).

For the gradients g_m of M objectives,

    lambda = argmin |sum_m lambda_m g_m|^2,    lambda_m >= 0,    sum_m lambda_m = 1

The combination g = sum_m lambda_m g_m is 0 exactly if no direction improves all
objectives.  Otherwise -g does: <g, g_m> >= |g|^2 for each m, with equality where
lambda_m > 0.

References:
  Desideri, "Multiple-gradient descent algorithm (MGDA) for multiobjective
  optimization", 2012.
  Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", 2018,
  arXiv:1810.04650, section 3.1, for its use with losses of one network.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["min_norm_shares"]


def min_norm_shares(
    products: Float[Array, "M M"],
    *,
    where: Bool[Array, " M"] | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> Float[Array, " M"]:
    """The shares lambda of the combination of M gradients with the smallest norm.

    Pairwise Frank-Wolfe: each step moves share from the gradient that extends farthest
    along the combination to the one that extends least, as far as the norm falls.  It
    converges linearly, and with two gradients in one step.

    Args:
      products: <g_i, g_j>, [M, M].
      where: which gradients there are, bool [M]; all by default.  Others get 0.
      tolerance: ends when <g, g_i> of the gradients with a share exceed the smallest
        <g, g_j> by at most this multiple of the largest |g_i|^2.
      max_steps: ends after so many steps in any case.

    Returns:
      lambda, [M], in the dtype of the products; all 0 if there are no gradients.

    References:
      Lacoste-Julien and Jaggi, "On the Global Linear Convergence of Frank-Wolfe
      Optimization Variants", 2015, arXiv:1511.05932, algorithm 2.
    """
    norms = jnp.diagonal(products)
    where = jnp.ones_like(norms, bool) if where is None else where
    largest = jnp.max(jnp.where(where, norms, 0))
    first = jnp.argmin(jnp.where(where, norms, jnp.inf))
    unit = lambda index: (jnp.arange(len(norms)) == index).astype(products.dtype)

    def ends(shares: Array) -> tuple[Array, Array, Array]:
        along = products @ shares
        toward = jnp.argmin(jnp.where(where, along, jnp.inf))
        away = jnp.argmax(jnp.where(shares > 0, along, -jnp.inf))
        return toward, away, along[away] - along[toward]

    def unfinished(loop: tuple[Array, Array]) -> Array:
        step, shares = loop
        return (step < max_steps) & (ends(shares)[2] > tolerance * largest)

    def moved(loop: tuple[Array, Array]) -> tuple[Array, Array]:
        step, shares = loop
        toward, away, gap = ends(shares)
        # Of a quadratic, the exact line search.
        curvature = norms[toward] + norms[away] - 2 * products[toward, away]
        best = gap / jnp.maximum(curvature, jnp.finfo(products.dtype).tiny)
        size = jnp.minimum(best, shares[away])
        # What is moved as a whole leaves exactly 0.
        left = jnp.where(best >= shares[away], 0, shares[away] - size)
        shares = jnp.where(unit(away) > 0, left, shares + size * unit(toward))
        return step + 1, shares

    start = jnp.where(where[first], unit(first), 0)
    return jax.lax.while_loop(unfinished, moved, (jnp.int32(0), start))[1]
