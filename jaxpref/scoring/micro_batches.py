"""Micro-batches without a pair: a packed step may fill only some of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpref.data.batch import PreferenceBatch

Body = Callable[..., tuple]
"""`body(carry, xs) -> (carry, ys)` of a scan over micro-batches."""


def skipping_empty(batch: PreferenceBatch) -> Callable[[Body], Body]:
    """A decorator of scan bodies: micro-batches of `batch` without a pair are skipped.

    The body's `xs` is a micro-batch, or a tuple that begins with one.  Where one is
    skipped, the carry stays and `ys` are zeros.  The bodies of padded batches, whose
    micro-batches all hold pairs, stay as they are.
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
