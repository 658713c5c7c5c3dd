"""Keys and values of earlier tokens, for decoding.

Every row has its own length, so rows need no padding on the left and may be at
different positions.  Layers with a sliding window keep only the tokens
within it, in a ring.

Axes: L layers of a stack, B rows, T prompt tokens, S slots, G key-value heads, K head
features, R rows to be inserted.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """The keys and values of consecutive layers of one kind.

    A row of n tokens has token t in slot t mod S, for the last S of its tokens.
    """

    keys: Float[Array, "L B G S K"]
    """In the compute dtype, with rotary positions applied."""
    values: Float[Array, "L B G S K"]
    """In the compute dtype."""
    window: int | None = dataclasses.field(metadata={"static": True})
    """The layers' sliding window; None if they see all earlier tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for one batch of sequences."""

    stacks: tuple[Stack, ...]
    """In the order of the layers."""
    lengths: Int[Array, " B"]
    """int32; the number of tokens of each row."""


def slots_of(window: int | None, length: int) -> int:
    """The slots S of rows of at most `length` tokens."""
    return length if window is None else min(window, length)


def stored(
    states: Float[Array, "L B T G K"], lengths: Int[Array, " B"], window: int | None
) -> Float[Array, "L B G S K"]:
    """Keys or values of prompts, padded on the right, as `Stack` holds them."""
    T = states.shape[2]
    slots = slots_of(window, T)
    states = jnp.swapaxes(states, 2, 3)
    if slots == T:
        return states
    # The last token that belongs in each slot; if there is none, its content is
    # never read.
    last = lengths[:, None] - 1
    tokens = jnp.maximum(last - (last - jnp.arange(slots)) % slots, 0)
    # Under vmap, a gather within a row needs no sharding annotation.
    in_row = jax.vmap(lambda x, index: x[:, :, index], in_axes=(1, 0), out_axes=1)
    return in_row(states, tokens)


def resized(cache: Any, length: int) -> Any:
    """A cache, or a tuple of caches, with slots for rows of at most `length` tokens.

    No row may have more tokens than that.
    """

    def resize(x: jax.Array, window: int | None) -> jax.Array:
        more = slots_of(window, length) - x.shape[3]
        return jax.lax.pad(
            x,
            jnp.zeros((), x.dtype),
            [(0, more if axis == 3 else 0, 0) for axis in range(5)],
        )

    def of_stack(x: Stack | jax.Array) -> Stack | jax.Array:
        if not isinstance(x, Stack):
            return x  # the lengths
        return Stack(resize(x.keys, x.window), resize(x.values, x.window), x.window)

    return jax.tree.map(of_stack, cache, is_leaf=lambda x: isinstance(x, Stack))


def with_rows(
    old: Shaped[Array, "*old"],
    new: Shaped[Array, "*new"],
    rows: Int[Array, " R"],
    spec: P,
) -> Shaped[Array, "*old"]:
    """`old` with rows of `new` in place of the rows with the given numbers.

    Args:
        old: an array in the layout `spec`, whose rows are sharded.
        new: at most as long as `old` on the axes after that of the rows; the rest of
            each replaced row is kept.
        rows: where each row of `new` goes; those with a number >= B are dropped.
        spec: the layout of `old`.
    """
    axis = list(spec).index(ROWS)
    part = tuple(slice(0, n) for n in new.shape[axis + 1 :])

    def write(old, new, rows):
        return old.at[(*(slice(None),) * axis, rows, *part)].set(new, mode="drop")

    layout = on_mesh(spec)
    if layout is None:
        return write(old, new, rows)

    def write_own(old, new, rows):
        own = old.shape[axis]
        rows = rows - jax.lax.axis_index(layout[axis]) * own
        return write(old, new, jnp.where(rows < 0, own, rows))

    everywhere = P(*(None if n == axis else name for n, name in enumerate(layout)))
    mapped = jax.shard_map(
        write_own,
        in_specs=(layout, everywhere, P(None)),
        out_specs=layout,
        check_vma=False,
    )
    return mapped(old, reshard(new, everywhere), reshard(rows, P(None)))


def rows_of(
    x: Shaped[Array, "*old"], rows: Int[Array, " R"], spec: P
) -> Shaped[Array, "*new"]:
    """The rows of `x` with the given numbers, which may repeat, in the same layout.

    Args:
        x: an array in the layout `spec`, whose rows are sharded.
        rows: their numbers.
        spec: the layout of `x`.
    """
    part = (*(slice(None),) * list(spec).index(ROWS), rows)
    layout = on_mesh(spec)
    if layout is None:
        return x[part]
    return x.at[part].get(out_sharding=layout)


def take(arrays: Any, rows: Int[Array, " R"]) -> Any:
    """The rows with the given numbers, which may repeat.

    Args:
        arrays: a pytree of a `Cache`, or several, and of arrays [B] and [B, N].
        rows: their numbers.
    """
    return jax.tree.map(lambda x: rows_of(x, rows, _spec(x)), arrays)


def insert(arrays: Any, new: Any, rows: Int[Array, " R"]) -> Any:
    """`arrays` with the rows of `new`, whose caches have at most as many slots.

    Args:
        arrays: as in `take`, of B rows.
        new: the same structure, of R rows.
        rows: where each of them goes; those with a number >= B are dropped.
    """
    write = lambda old, new: with_rows(old, new, rows, _spec(old))
    return jax.tree.map(write, arrays, new)


def _spec(x: jax.Array) -> P:
    """The layout of keys, values, or arrays whose first axis is that of the rows."""
    return {1: SPECS.rows, 2: SPECS.tokens, 5: SPECS.cache}[x.ndim]
