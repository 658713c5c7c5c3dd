"""The six quantities that determine the error of a mixture, and their estimates."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from jaxpref.gradients import _sketches
from jaxpref.losses import _common

__all__ = ["Ingredients", "ingredients"]

Number = float | int | Shaped[Array, ""]
"""A number, or a traced scalar."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ingredients:
    """The quantities that determine the error of the mixture.

    Pass them on as `optimal_alpha(**vars(found))`.  They have the gradient's unit
    squared.  The exact variances are >= 0; unbiased estimates need not be.
    """

    trace_variance: Float[Array, "*batch"]
    """tr S_t of the gradient that is used (of the mean, if it averages draws)."""
    empty_variance: Float[Array, "*batch"]
    """tr S_e, likewise; 0 conditional on the data."""
    covariance: Float[Array, "*batch"]
    """tr S_te; 0 if the two come from independent data."""
    trace_bias_sq: Float[Array, "*batch"]
    """||b_t||^2."""
    empty_bias_sq: Float[Array, "*batch"]
    """||b_e||^2."""
    bias_dot: Float[Array, "*batch"]
    """<b_t, b_e>."""


def ingredients(
    trace_draws: PyTree,
    empty_draws: PyTree,
    *,
    paired: bool = False,
    trace_size: Number = 1,
    empty_size: Number = 1,
    trace_where: Bool[Array, " K"] | None = None,
    empty_where: Bool[Array, " M"] | None = None,
) -> Ingredients:
    """Unbiased estimates of the six quantities from repeated draws of both gradients.

        tr S_t     = sum_k ||g_t,k - mean_t||^2 / (K - 1)             =: s_t
        tr S_e     = sum_m ||g_e,m - mean_e||^2 / (M - 1), 0 if M = 1 =: s_e
        tr S_te    = sum_k <g_t,k - mean_t, g_e,k - mean_e> / (K - 1) =: s_te, if paired
        ||b_e||^2  = ||mean_e - mean_t||^2 - s_t / K - s_e / M + 2 s_te / K

    For a gradient that averages trace_size and empty_size such draws, they become s_t /
    trace_size, s_e / empty_size, and s_te / max(trace_size, empty_size).

    E g_t is taken as the true gradient mu, so trace_bias_sq and bias_dot are 0.  A bias
    of the trace gradient is not visible in its draws.  Ignoring it shifts alpha by
    <b_t, b_t - b_e> / denominator.  The shift is toward the trace gradient, unless the
    empty gradient has a larger error in the same direction, <b_t, b_e> > ||b_t||^2.

    The estimate of ||b_e||^2 may be negative.  It is not clipped, so that its mean over
    steps is unbiased; `optimal_alpha` clips.

    A draw is one independent sample of what varies.  Conditional on the data, it is the
    batch gradient with the k-th trace of every pair (and M = 1, because without traces
    nothing varies).  If the data vary too, it is the gradient of one pair.  Both kinds
    of pairs may be in one array that is passed twice, with two masks.

    How accurate alpha is after a number of steps: see `jaxpref.gradients.bvpo`.

    Args:
      trace_draws: a pytree whose leaves have a leading axis of K >= 2 draws: gradients
        [K, ...] or their sketches under one key, [K, size].
      empty_draws: the same with M >= 1 draws.  M = 1 means that g_e is not random.
      paired: whether the k-th draws of both use the same data; requires K = M.
      trace_size: number of draws that the trace gradient in use averages.
      empty_size: the same for the empty-trace gradient.
      trace_where: which draws are real, [K]; None if all are.  The other draws are
        ignored, even if they hold NaN.
      empty_where: the same, [M].  Paired draws must be real in both.

    Returns:
      `Ingredients` of single numbers, at least float32.  They are NaN, which `running`
      skips, if there are fewer than two real draws (for M = 1: fewer than one).

    Raises:
      TypeError: if a leaf is not floating point.
      ValueError: if structures or shapes do not fit, or there are too few draws.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.gradients.bvpo import ingredients, optimal_alpha
      >>> traces = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> found = ingredients(traces, jnp.array([[2.0, 2.0]]))
      >>> print(found.trace_variance, found.empty_bias_sq, optimal_alpha(**vars(found)))
      2.0 3.0 0.6

    References:
      Zhu et al., "BVPO", 2025, arXiv:2510.05095, for what is estimated.
    """
    draws = _draws(trace_draws, empty_draws)
    trace_count, empty_count = (leaf.shape[0] for leaf in draws[0])
    _check_counts(trace_count, empty_count, paired=paired)
    _common.positive("trace_size", trace_size)
    _common.positive("empty_size", empty_size)
    trace_where = _where("trace_where", trace_where, trace_count)
    empty_where = _where("empty_where", empty_where, empty_count)
    if paired:
        trace_where = empty_where = trace_where & empty_where
    dtype = jnp.result_type(*(leaf for pair in draws for leaf in pair))
    k, m = (jnp.sum(where).astype(dtype) for where in (trace_where, empty_where))

    zero = jnp.zeros((), dtype)
    scatter_t = scatter_e = scatter_te = gap = zero
    for trace, empty in draws:
        mean_t, off_t = _centered(trace, trace_where, k)
        mean_e, off_e = _centered(empty, empty_where, m)
        scatter_t += jnp.sum(off_t**2)
        scatter_e += jnp.sum(off_e**2)
        scatter_te += jnp.sum(off_t * off_e) if paired else 0
        gap += jnp.sum((mean_e - mean_t) ** 2)

    s_t, s_te = _per_draw(scatter_t, k), _per_draw(scatter_te, k)
    s_e = _per_draw(scatter_e, m) if empty_count > 1 else zero
    gap = jnp.where((k > 0) & (m > 0), gap, jnp.nan)
    k, m = jnp.maximum(k, 1), jnp.maximum(m, 1)
    sizes = jnp.asarray(trace_size, dtype), jnp.asarray(empty_size, dtype)
    return Ingredients(
        trace_variance=s_t / sizes[0],
        empty_variance=s_e / sizes[1],
        covariance=s_te / jnp.maximum(*sizes) if paired else zero,
        trace_bias_sq=zero,
        empty_bias_sq=gap - s_t / k - s_e / m + (2 * s_te / k if paired else 0),
        bias_dot=zero,
    )


def _check_counts(trace_count: int, empty_count: int, *, paired: bool) -> None:
    """Raises ValueError if there are too few draws for the estimates."""
    if trace_count < 2 or empty_count < 1:
        raise ValueError(
            "Expected at least 2 trace draws and 1 empty-trace draw, got "
            f"{trace_count} and {empty_count}."
        )
    if paired and trace_count != empty_count:
        raise ValueError(
            f"Expected equal numbers of draws if they are paired, got {trace_count} "
            f"and {empty_count}."
        )


def _draws(trace_draws, empty_draws) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs of leaves of both trees; raises ValueError unless they match."""
    trees = (trace_draws, empty_draws)
    if len({jax.tree.structure(tree) for tree in trees}) > 1 or not jax.tree.leaves(
        trace_draws
    ):
        raise ValueError("Expected draws of one structure that holds arrays.")
    pairs = list(zip(*(map(_sketches.wide, jax.tree.leaves(tree)) for tree in trees)))
    counts = {tuple(leaf.shape[:1] for leaf in pair) for pair in pairs}
    shapes_fit = all(trace.shape[1:] == empty.shape[1:] for trace, empty in pairs)
    if len(counts) > 1 or not all(counts.copy().pop()) or not shapes_fit:
        shapes = ", ".join(f"{a.shape} and {b.shape}" for a, b in pairs[:4])
        raise ValueError(f"Expected draws [K, ...] and [M, ...], got {shapes}.")
    return pairs


def _where(name: str, where, count: int) -> jax.Array:
    if where is None:
        return jnp.ones(count, bool)
    if jnp.shape(where) != (count,):
        raise ValueError(
            f"Expected {name} of shape ({count},), got {jnp.shape(where)}."
        )
    return jnp.asarray(where, bool)


def _centered(draws: jax.Array, where: jax.Array, count) -> tuple[jax.Array, jax.Array]:
    """The mean of the real draws, and each draw's deviation from it (0 if not real)."""
    where = jnp.expand_dims(where, tuple(range(1, draws.ndim)))
    draws = jnp.where(where, draws, 0)
    mean = jnp.sum(draws, axis=0) / jnp.maximum(count, 1).astype(draws.dtype)
    return mean, jnp.where(where, draws - mean, 0)


def _per_draw(scatter: jax.Array, count: jax.Array) -> jax.Array:
    """The unbiased variance from a sum over the draws; NaN if there is only one."""
    return jnp.where(count > 1, scatter / jnp.maximum(count - 1, 1), jnp.nan)
