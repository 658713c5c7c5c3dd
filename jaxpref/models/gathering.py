"""Weights that are stored in parts over `fsdp`: gathered whole, slopes scattered back.

Left to the compiler, a device that has gathered a weight gets the whole of its slope by
an all-reduce, in every chunk of a loop that uses it, and keeps a part: twice the bytes,
or many times.  Here each of the N groups of rows has a copy of its own, so what slopes
a device finds are added up where they are, and one reduce-scatter ends it.

Axes: N devices of `data` and `fsdp` together, B rows, T tokens, V vocabulary, D hidden.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpref.models.config import SPECS, on_mesh, place


def carried(move: Callable, back: Callable, weight, dtype) -> jax.Array:
    """`move(weight)`, of numbers rounded to `dtype`; its slope is not rounded.

    Args:
        move: a rearrangement, linear.
        back: its transpose, of slopes.
        weight: in the parameter dtype, in which the result comes too: a cast to `dtype`
            undoes that, and nothing is made twice as wide.
        dtype: of what is moved, if it is the narrower one.
    """
    dtype = min(jnp.dtype(dtype), weight.dtype, key=lambda d: d.itemsize)

    @jax.custom_vjp
    def apply(weight):
        return move(weight.astype(dtype)).astype(weight.dtype)

    apply.defvjp(lambda weight: (apply(weight), None), lambda _, slope: (back(slope),))
    return apply(weight)


def copies(weight, dtype) -> jax.Array:
    """A weight [V, D] or [D, V] as N copies, one for each group of rows.

    The all-gather of FSDP, in `dtype`; slopes, in the parameter dtype, come back by one
    reduce-scatter.
    """

    def gather(part):
        return jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)[None]

    def scatter(slope):
        slope = slope[0]
        for groups in phases(jax.lax.axis_size("fsdp")):
            slope = jax.lax.psum_scatter(
                slope, "fsdp", scatter_dimension=0, axis_index_groups=groups, tiled=True
            )
        return jax.lax.psum(slope, "data")

    if on_mesh(SPECS.embed) is None:
        return weight[None]
    gather = _on_each_device(gather, SPECS.embed, SPECS.copies)
    scatter = _on_each_device(scatter, SPECS.copies, SPECS.embed)
    return carried(gather, scatter, weight, dtype)


def phases(size: int) -> list[list[list[int]]]:
    """Groups of devices whose reduce-scatters, one after the other, are one of all.

    The TPU's compiler makes of a reduce-scatter of a whole slice an all-reduce, of
    which each chip keeps a part: twice the bytes.  Not so of one along a part of its
    axes: so first the devices that are `inner` apart, then those that stand together.
    """
    inner = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    outer = size // inner
    apart = [[i + inner * k for k in range(outer)] for i in range(inner)]
    together = [[i * inner + k for k in range(inner)] for i in range(outer)]
    return [apart, together] if inner > 1 else [apart]


def turned(table, dtype) -> jax.Array:
    """Copies [N, V, D] of an embedding as those of a head [N, D, V]."""
    turn = lambda table: place(jnp.swapaxes(table, 1, 2), SPECS.copies)
    return carried(turn, turn, table, dtype)


def look_up(table, tokens, dtype) -> jax.Array:
    """Vectors [B, T, D] in `dtype` of tokens [B, T], by copies [N, V, D].

    Slopes are added up in the dtype of the table.
    """
    size, wide = table.shape[1], table.dtype

    @jax.custom_vjp
    def apply(table, tokens):
        return _on_each_device(
            lambda table, tokens: table[0].astype(dtype).at[tokens].get(),
            (SPECS.copies, SPECS.tokens),
            SPECS.features,
        )(table, tokens)

    def add_up(tokens, slope):
        nothing = jnp.zeros((1, size, slope.shape[-1]), wide)
        return nothing.at[0, tokens].add(slope.astype(wide))

    def backward(tokens, slope):
        specs = SPECS.tokens, SPECS.features
        return _on_each_device(add_up, specs, SPECS.copies)(tokens, slope), None

    apply.defvjp(lambda table, tokens: (apply(table, tokens), tokens), backward)
    return apply(table, place(tokens, SPECS.tokens))


def _on_each_device(function: Callable, specs, out) -> Callable:
    """The function of each device's own part, where a mesh is set."""
    if on_mesh(out) is None:
        return function
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)
