"""Skipping empty micro-batches, since a packed step may not fill all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpref.data.batch import PreferenceBatch

Body = Callable[..., tuple]
"""`body(carry, xs) -> (carry, ys)` of a scan over micro-batches."""


def skipping_empty(batch: PreferenceBatch) -> Callable[[Body], Body]:
    """A decorator for scan bodies that skips micro-batches of `batch` without pairs.

    The body's `xs` is a micro-batch, or a tuple that begins with one.  For a skipped
    one, the carry is unchanged and `ys` are zeros.  In a padded batch, every
    micro-batch holds pairs, and the body is returned unchanged.
    """
    if batch.segments is None or len(batch.pair_index) == 1:
        return lambda body: body
    return _unless_empty


def _unless_empty(body: Body) -> Body:
    def skipping(carry, xs):
        def skip(carry, xs):
            ys = jax.eval_shape(body, carry, xs)[1]
            return carry, jax.tree.map(_zeros, ys)

        micro = xs[0] if isinstance(xs, tuple) else xs
        return jax.lax.cond(jnp.any(micro.pair_index >= 0), body, skip, carry, xs)

    return skipping


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = jnp.zeros(like.shape, like.dtype)
    return zeros if like.sharding is None else jax.reshard(zeros, like.sharding.spec)
