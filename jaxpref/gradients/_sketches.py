"""Sketches: random projections of a gradient to a few numbers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key, PyTree, UInt32

from jaxpref.losses import _common

__all__ = ["direction", "sketch"]

RandomKey = Key[Array, ""] | UInt32[Array, "2"]
ROW = 1024
"""Row length into which scalars and vectors are reshaped."""


def sketch(gradient: PyTree, key: RandomKey, *, size: int) -> Float[Array, " size"]:
    """Random projections of a gradient that preserve its squared norm on average.

        out_j = <g, v_j> / sqrt(size),  v_j one Rademacher vector each (signs +-1)

    E <sketch(a), sketch(b)> = <a, b> exactly, over keys.  So everything that is
    quadratic in gradients, such as `ingredients`, remains unbiased.  The squared norm
    of one sketch has the relative standard deviation

        sqrt(2 / size (1 - sum_i g_i^4 / ||g||^4)),  at most sqrt(2 / size)

    or 0.18 at size 64 and 0.09 at 256, for any number of parameters.  Use the same key
    for vectors to be compared, and different keys for different steps.  Then the error
    of a mean over T steps decreases to sqrt(2 / (size T)); with a single key for all
    steps it would not decrease.

    The sign of element (r, c) of a matrix is a product of three independent signs,
    a_jr b_jc d_rc.  The v_j then have the same mean and variance as if all signs were
    independent.  This costs one random word per parameter and one thin matrix product
    (2 size operations per parameter; a training step takes 6 per parameter and token).
    No array of shape [size, parameters] is materialized.  Under Explicit axes the
    leaves may have any sharding; the sketch is replicated.

    Args:
      gradient: a pytree of floating-point arrays.
      key: a jax random key.
      size: number of projections.

    Returns:
      [size], at least float32.  For a stack of gradients use
      `jax.vmap(lambda g: sketch(g, key, size=size))(stack)`.

    Raises:
      ValueError: if `size` < 1 or there is no array.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpref.gradients.bvpo import sketch
      >>> gradient = {"w": jnp.ones((50, 40)), "b": jnp.ones(40)}  # ||g||^2 = 2040
      >>> short = sketch(gradient, jax.random.key(0), size=256)
      >>> short.shape, bool(abs(jnp.sum(short**2) / 2040 - 1) < 3 * (2 / 256) ** 0.5)
      ((256,), True)
    """
    if size < 1:
        raise ValueError(f"Expected size >= 1, got {size}.")
    leaves = [wide(leaf) for leaf in jax.tree.leaves(gradient)]
    if not leaves:
        raise ValueError("Expected a gradient with at least one array, got none.")

    def project(key, *leaves):
        keys = jax.random.split(key, len(leaves))
        return sum(_project(*pair, size=size) for pair in zip(leaves, keys))

    apply: Callable[..., Any] = project
    if _explicit():
        # The product contracts sharded axes; let the compiler insert the reductions.
        apply = jax.sharding.auto_axes(project, out_sharding=PartitionSpec())
    out = apply(key, *leaves)
    return out / jnp.sqrt(jnp.asarray(size, out.dtype))


def direction(key: RandomKey, like: PyTree) -> PyTree:
    """A Rademacher vector v over all parameters, for a forward-mode probe.

        <g_i, v> = d loss_i(params + e v) / d e  at e = 0

    `jax.jvp` of the losses of all n pairs along v computes this number for every pair,
    for about the cost of another forward pass and without any gradient.  As E <a, v>
    <b, v> = <a, b>, the n numbers are sketches of size 1.  Pass them to `ingredients`
    directly, [n].  In addition to the error of n draws, this has a relative error of
    sqrt(2), or sqrt(2 / T) for a mean over T steps with different keys.

    Args:
      key: a jax random key.
      like: a pytree of floating-point arrays, for example the parameters.

    Returns:
      A pytree of +-1 with the structure, shapes, dtypes, and sharding of `like`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpref.gradients.bvpo import direction
      >>> losses = lambda w: jnp.array([[1.0, 2.0], [3.0, 4.0]]) @ w  # two pairs
      >>> w = jnp.zeros(2)
      >>> v = direction(jax.random.key(1), w)
      >>> _, probes = jax.jvp(losses, (w,), (v,))
      >>> print(probes - jnp.array([[1.0, 2.0], [3.0, 4.0]]) @ v)
      [0. 0.]
    """
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))

    def one(key, leaf):
        layout = jax.typeof(leaf).sharding if _explicit() else None
        return _signs(key, jnp.shape(leaf), jnp.result_type(leaf), layout)

    return structure.unflatten(map(one, keys, leaves))


def wide(leaf) -> jax.Array:
    """Casts the array to at least float32."""
    (leaf,) = _common.promoted(gradient=leaf)
    return leaf


@functools.partial(jax.jit, static_argnames="size")
def _project(leaf: jax.Array, key, *, size: int) -> jax.Array:
    if leaf.ndim < 2:
        row = min(ROW, max(leaf.size, 1))
        flat = jnp.pad(leaf.reshape(-1), (0, -leaf.size % row))
        leaf = flat.reshape(-1, row)
    # Choose the axis that keeps both thin factors small: sides n and P / n.
    axes = reversed(range(leaf.ndim))
    axis = min(axes, key=lambda a: leaf.shape[a] ** 2 + _rest(leaf, a) ** 2)
    each, along, across = jax.random.split(key, 3)
    along = _signs(along, (leaf.shape[axis], size), leaf.dtype)
    signed = leaf * _signs(each, leaf.shape, leaf.dtype)
    # Full precision instead of the accelerator's default: small differences matter.
    rows = jnp.tensordot(signed, along, axes=(axis, 0), precision="highest")
    across = _signs(across, rows.shape, leaf.dtype)
    return jnp.sum(rows * across, axis=tuple(range(rows.ndim - 1)))


def _rest(leaf: jax.Array, axis: int) -> int:
    return leaf.size // max(leaf.shape[axis], 1)


def _signs(key, shape, dtype, layout=None) -> jax.Array:
    odd = jax.random.bits(key, shape, out_sharding=layout) & 1
    return jnp.where(odd, -1, 1).astype(dtype)


def _explicit() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.are_all_axes_explicit
