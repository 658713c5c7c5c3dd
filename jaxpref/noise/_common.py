"""Shared helpers: promotion, checks, and sums per annotator."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxpref.losses._common import is_number

HALVINGS = 40
"""Bisection steps; the final bracket is below the spacing of float32."""


def sums(weights, annotators, where, like):
    """The sum of the weights and the number of votes of each annotator."""
    annotators = jnp.asarray(annotators)
    where = jnp.ones(annotators.shape, bool) if where is None else where
    weights = jnp.where(where, weights, 0).astype(like.dtype)
    annotators = jnp.where(annotators < 0, like.size - 1, annotators)
    # Uses a comparison, because a scatter along a sharded axis has no sharding rule.
    own = (annotators[..., None] == jnp.arange(like.size)) & where[..., None]
    batch = tuple(range(annotators.ndim))
    right = jnp.sum(jnp.where(own, weights[..., None], 0), axis=batch)
    return right, jnp.sum(own, axis=batch).astype(like.dtype)


def floating(values) -> jax.Array:
    """Casts `values` to at least float32."""
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"Expected floating-point numbers, got {values.dtype}.")
    return values.astype(jnp.result_type(jnp.float32, values.dtype))


def finite(logits: jax.Array) -> jax.Array:
    """Clips infinities to huge finite numbers, which cancel to 0 instead of NaN."""
    most = jnp.finfo(logits.dtype).max / 4
    return jnp.clip(logits, -most, most)


def logit(probability, dtype) -> jax.Array:
    """log(p / (1 - p)), finite at 0 and 1."""
    probability = jnp.asarray(probability, dtype)
    return finite(jnp.log(probability) - jnp.log1p(-probability))


def pseudo_counts(prior):
    """Checks and returns the prior (a, b); arrays pass unchecked.

    Raises:
      ValueError: if a number is not finite and >= 0.
    """
    a, b = prior
    for votes in (a, b):
        if is_number(votes) and not 0 <= votes < float("inf"):
            raise ValueError(f"Expected pseudo-counts (a, b) >= 0, got {prior}.")
    return a, b


def check_annotators(annotators, where, num_annotators) -> None:
    """Raises ValueError for indices out of range; traced arrays pass unchecked."""
    if isinstance(annotators, Tracer) or isinstance(where, Tracer):
        return
    least = int(jnp.min(jnp.where(where, annotators, 0)))
    most = int(jnp.max(jnp.where(where, annotators, 0)))
    if least < -1 or most >= num_annotators:
        raise ValueError(
            f"Expected annotators from -1 to {num_annotators - 1}, got {least} to "
            f"{most}."
        )
    last = jnp.any(where & (annotators == num_annotators - 1))
    if least == -1 and bool(last):
        raise ValueError(
            f"Annotators hold -1 (unknown) and {num_annotators - 1}, which both mean "
            f"the last of {num_annotators}: pass num_annotators={num_annotators + 1}."
        )


def bisect(below, low: jax.Array, high: jax.Array) -> jax.Array:
    """The point between low and high where `below` becomes false; an end if none."""

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        return jax.lax.cond(
            below(middle), lambda: (middle, high), lambda: (low, middle)
        )

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (low, high))
    return (low + high) / 2
