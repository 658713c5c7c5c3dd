"""Weights that are stored in parts over `fsdp`: gathered whole, slopes scattered back.

Left to the compiler, a device that has gathered a weight gets the whole of its slope by
an all-reduce, of the head in every chunk of a loop, and keeps a part: twice the bytes,
or many times.  Here each of the N groups of rows has a copy of its own, so what slopes
a device finds are added up where they are, and one reduce-scatter ends it.

Axes: N devices of `data` and `fsdp` together, B rows, T tokens, V vocabulary, D hidden.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxpref.models.config import SPECS, on_mesh, place, platform
from jaxpref.sharding import ROWS


def in_parts(weight) -> bool:
    """Whether several devices of `fsdp` hold parts of a weight."""
    if row_groups() == 1:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    spec = jax.typeof(weight).sharding.spec
    return "fsdp" in spec and mesh.shape["fsdp"] > 1


def row_groups() -> int:
    """N, of the mesh that is set; 1 where none is, or where it is not of TPUs.

    It is the TPU's compiler that needs to be told.  On eight virtual CPU devices steps
    with these collectives were seen to wait for each other for ever.
    """
    if platform() != "tpu":
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ROWS)


def gather(weight) -> jax.Array:
    """A weight that is in parts as N copies [N, ...], one for each group of rows."""
    spec = jax.typeof(weight).sharding.spec
    axis = spec.index("fsdp")

    def whole(part):
        for groups in reversed(phases(jax.lax.axis_size("fsdp"))):
            part = jax.lax.all_gather(
                part, "fsdp", axis=axis, axis_index_groups=groups, tiled=True
            )
        return part[None]

    return jax.shard_map(
        whole, in_specs=spec, out_specs=of_copies(spec), check_vma=False
    )(weight)


def scatter(slope, spec: P) -> jax.Array:
    """Slopes [N, ...] of the copies, summed; in the layout `spec` of the weight."""
    axis = spec.index("fsdp")

    def part(slope):
        slope = slope[0]
        for groups in phases(jax.lax.axis_size("fsdp")):
            slope = jax.lax.psum_scatter(
                slope,
                "fsdp",
                scatter_dimension=axis,
                axis_index_groups=groups,
                tiled=True,
            )
        return jax.lax.psum(slope, "data")

    return jax.shard_map(
        part, in_specs=of_copies(spec), out_specs=spec, check_vma=False
    )(slope)


def of_copies(spec: P) -> P:
    """The layout of a weight's copies."""
    return P(ROWS, *(None if axes == "fsdp" else axes for axes in spec))


def phases(size: int) -> list[list[list[int]]]:
    """Groups of devices whose reduce-scatters, one after the other, are one of all.

    Of a reduce-scatter over a whole slice the TPU's compiler makes an all-reduce, of
    which each chip keeps a part, and so it does with an all-gather where the slice has
    three axes: twice the bytes.  Not so over groups: so first the devices that are
    `inner` apart, then those that stand together; gathered the other way round.
    """
    inner = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    outer = size // inner
    apart = [[i + inner * k for k in range(outer)] for i in range(inner)]
    together = [[i * inner + k for k in range(inner)] for i in range(outer)]
    return [apart, together] if inner > 1 else [apart]


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
    if on_mesh(SPECS.embed) is None:
        return weight[None]
    spec = jax.typeof(weight).sharding.spec
    return carried(gather, lambda slope: scatter(slope, spec), weight, dtype)


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
