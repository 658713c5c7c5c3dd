"""Sketches: a few random numbers that stand for a gradient of many."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key, PyTree, UInt32

from jaxpref.losses import _common

__all__ = ["direction", "sketch"]

RandomKey = Key[Array, ""] | UInt32[Array, "2"]
ROW = 1024
"""Elements of a row into which a leaf without axes to choose from is cut."""


def sketch(gradient: PyTree, key: RandomKey, *, size: int) -> Float[Array, " size"]:
    """Random projections of a gradient, which keep its squared norm on average.

        out_j = <g, v_j> / sqrt(size),  v_j one Rademacher vector each (signs +-1)

    E <sketch(a), sketch(b)> = <a, b> over keys, exactly, so whatever is quadratic in
    gradients, as all of `ingredients` is, stays unbiased.  The squared norm of one
    sketch has the relative standard deviation

        sqrt(2 / size (1 - sum_i g_i^4 / ||g||^4)),  at most sqrt(2 / size)

    0.18 at 64 and 0.09 at 256, whatever the number of parameters.  Vectors that shall
    be compared need the same key, those of different steps different ones: then the
    error of a mean over T steps falls to sqrt(2 / (size T)), while with one key for all
    of them it would stay.

    The signs of element (r, c) of a matrix are a_jr b_jc d_rc, three independent ones:
    the v_j have the mean and variance above as if all their signs were drawn, for one
    random word per parameter and one thin matrix product (2 size operations per
    parameter), where a training step takes 6 per parameter and token.  Nothing of
    shape [size, parameters] is ever held.  Under Explicit axes the leaves may lie as
    they like; the sketch is on every device.

    Args:
      gradient: a pytree of floating-point arrays.
      key: a jax random key.
      size: how many projections.

    Returns:
      [size], at least float32; of a stack of gradients,
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

    if _explicit():
        # A product contracts axes that are split; the compiler knows how to add up.
        project = jax.sharding.auto_axes(project, out_sharding=PartitionSpec())
    out = project(key, *leaves)
    return out / jnp.sqrt(jnp.asarray(size, out.dtype))


def direction(key: RandomKey, like: PyTree) -> PyTree:
    """One Rademacher vector v over all parameters, for a forward-mode probe.

        <g_i, v> = d loss_i(params + e v) / d e  at e = 0

    `jax.jvp` of the losses of all n pairs along v gives this number of every pair's
    gradient for about the cost of one more forward pass, and without any gradient.  As
    E <a, v> <b, v> = <a, b>, the n numbers are sketches of size 1: `ingredients` takes
    them as they are, [n], with an error of sqrt(2) relative to what it estimates (and
    that of n draws), which averages over steps of different keys as sqrt(2 / T).

    Args:
      key: a jax random key.
      like: a pytree of floating-point arrays, for example the parameters.

    Returns:
      A pytree of +-1 in the structure, shapes, dtypes and layout of `like`.

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
    """The array in at least float32."""
    (leaf,) = _common.promoted(gradient=leaf)
    return leaf


@functools.partial(jax.jit, static_argnames="size")
def _project(leaf: jax.Array, key, *, size: int) -> jax.Array:
    if leaf.ndim < 2:
        row = min(ROW, max(leaf.size, 1))
        flat = jnp.pad(leaf.reshape(-1), (0, -leaf.size % row))
        leaf = flat.reshape(-1, row)
    # The axis that keeps both thin factors small: their longer sides are n and P / n.
    axes = reversed(range(leaf.ndim))
    axis = min(axes, key=lambda a: leaf.shape[a] ** 2 + _rest(leaf, a) ** 2)
    each, along, across = jax.random.split(key, 3)
    along = _signs(along, (leaf.shape[axis], size), leaf.dtype)
    signed = leaf * _signs(each, leaf.shape, leaf.dtype)
    # Not in the short floats that accelerators prefer: small differences matter.
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
