"""Maxima and intervals of a likelihood on a grid of evenly spaced values."""

import jax
import jax.numpy as jnp

CELLS = 41
"""Points per axis, by default."""


def spread(box, cells: int = CELLS) -> jax.Array:
    """Evenly spaced values from one end of a box to the other."""
    return box[0] + jnp.linspace(0, 1, cells, dtype=box[0].dtype) * (box[1] - box[0])


def around(values, selected, box):
    """The range of the selected values, extended by a cell on each side."""
    cell = (box[1] - box[0]) / (values.size - 1)
    low = jnp.min(jnp.where(selected, values, jnp.inf)) - cell
    high = jnp.max(jnp.where(selected, values, -jnp.inf)) + cell
    return jnp.maximum(low, box[0]), jnp.minimum(high, box[1])


def peak(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Position and height of the maximum of a row, by a parabola through three points.

    The peak of a likelihood may be narrower than a cell.
    """
    at = jnp.argmax(values)
    inner = jnp.clip(at, 1, values.size - 2)
    left, middle, right = (values[inner + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    usable = (at == inner) & (bend < 0) & jnp.isfinite(bend)
    bend = jnp.where(usable, bend, -1)
    gradient = jnp.where(usable, (right - left) / 2, 0)
    return at - gradient / bend, values[at] - gradient**2 / (2 * bend)


def ridge(gains: jax.Array) -> jax.Array:
    """The maximum of each row."""
    return jax.vmap(lambda row: peak(row)[1])(gains)


def top(values: jax.Array, profile: jax.Array) -> jax.Array:
    """The value that maximizes a profile over evenly spaced values."""
    return values[0] + peak(profile)[0] * (values[1] - values[0])


def ends(values: jax.Array, profile: jax.Array, allowed):
    """The outermost values whose profile is less than `allowed` below its maximum."""
    over = profile - (peak(profile)[1] - allowed)
    inside = over > 0
    first, last = jnp.argmax(inside), values.size - 1 - jnp.argmax(inside[::-1])

    def crossing(inner, outer):
        outer = jnp.clip(outer, 0, values.size - 1)
        share = over[inner] / jnp.where(inner == outer, 1, over[inner] - over[outer])
        share = jnp.where(jnp.isfinite(share), share, 0)
        return values[inner] + share * (values[outer] - values[inner])

    return crossing(first, first - 1), crossing(last, last + 1)
