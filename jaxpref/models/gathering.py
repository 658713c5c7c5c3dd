"""Explicit FSDP: weights are gathered once, gradients reduce-scattered once.

If this is left to the compiler, a device that has gathered a weight receives the whole
gradient in an all-reduce and keeps only its own shard: at least twice the bytes, and
for the head once per chunk of a loop.  Here, each of the N row groups has its own copy.
A device sums the gradients that it computes locally, and one reduce-scatter at the end
sums them over devices.

Axes: N row groups (the devices of `data`, `fsdp` and `expert` together), B rows,
T tokens, V vocabulary, D hidden.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jaxpref.models.layout import SPECS, num_parts, on_mesh, platform, reshard
from jaxpref.sharding import ROWS


def is_fsdp_sharded(weight: Shaped[Array, "..."]) -> bool:
    """Whether a weight is sharded over several devices that also split the rows."""
    if num_row_groups() == 1:
        return False
    return num_parts(_fsdp_axis(jax.typeof(weight).sharding.spec)[1]) > 1


def num_row_groups() -> int:
    """N of the current mesh; 1 without a mesh or on devices other than TPUs.

    Only the TPU compiler needs this.  On eight virtual CPU devices, steps with these
    collectives sometimes deadlocked.
    """
    return num_parts(ROWS) if platform() == "tpu" else 1


def _fsdp_axis(spec: P) -> tuple[int, tuple[str, ...]]:
    """The axis of a weight that is sharded over fsdp, and all its mesh axes.

    Without such an axis, -1 and no mesh axes.
    """
    for axis, names in enumerate(spec):
        names = names if isinstance(names, tuple) else (names,)
        if "fsdp" in names:
            return axis, names
    return -1, ()


def all_gather(weight: Shaped[Array, "*shape"]) -> Shaped[Array, "N *shape"]:
    """An fsdp-sharded weight as N copies [N, ...], one per row group."""
    spec = jax.typeof(weight).sharding.spec
    axis, names = _fsdp_axis(spec)

    return jax.shard_map(
        lambda shard: gather_shards(shard, names, axis)[None],
        in_specs=spec,
        out_specs=row_group_layout(spec),
        check_vma=False,
    )(weight)


def gather_frozen(array: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """An array without a gradient, whole on every device of `fsdp`."""
    if on_mesh(P()) is None:
        return array
    spec = jax.typeof(array).sharding.spec
    axis, names = _fsdp_axis(spec)
    whole = without_fsdp(spec)
    if not is_fsdp_sharded(array):
        return reshard(array, whole)
    return jax.shard_map(
        lambda shard: gather_shards(shard, names, axis),
        in_specs=spec,
        out_specs=whole,
        check_vma=False,
    )(array)


def without_fsdp(spec: P) -> P:
    """The layout of an array that has been gathered over fsdp."""
    axis, _ = _fsdp_axis(spec)
    return P(*(None if i == axis else names for i, names in enumerate(spec)))


def reduce_scatter(
    gradients: Shaped[Array, "N *shape"], spec: P
) -> Shaped[Array, "*shape"]:
    """The sum of the copies' gradients [N, ...], in the layout `spec` of the weight."""
    axis, names = _fsdp_axis(spec)

    def shard(gradient):
        return jax.lax.psum(scatter_sums(gradient[0], names, axis), "data")

    return jax.shard_map(
        shard, in_specs=row_group_layout(spec), out_specs=spec, check_vma=False
    )(gradients)


def row_group_layout(spec: P) -> P:
    """The layout of a weight's copies [N, ...], given that of the weight.

    The copies of experts' matrices are those of their own experts, so N is the number
    of row groups that share them.
    """
    axis, _ = _fsdp_axis(spec)
    kept = [None if i == axis else names for i, names in enumerate(spec)]
    copies = tuple(name for name in ROWS if name not in kept)
    return cast(P, on_mesh(P(copies, *kept)))


def gather_shards(
    x: Shaped[Array, "..."], names: tuple[str, ...], axis: int
) -> Shaped[Array, "..."]:
    """Within `jax.shard_map`: the whole of an axis that is sharded over mesh axes."""
    for name in reversed(names):
        for groups in reversed(_stages(name)):
            x = jax.lax.all_gather(
                x, name, axis=axis, axis_index_groups=groups, tiled=True
            )
    return x


def scatter_sums(
    x: Float[Array, "..."], names: tuple[str, ...], axis: int
) -> Float[Array, "..."]:
    """The transpose of `gather_shards`: sums over devices, of which each has a part."""
    for name in names:
        for groups in _stages(name):
            x = jax.lax.psum_scatter(
                x, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True
            )
    return x


def _stages(name: str) -> list[Any]:
    """The groups of the stages of a reduce-scatter over a mesh axis."""
    if platform() != "tpu":
        return [None]
    return hierarchical_groups(jax.lax.axis_size(name))


def hierarchical_groups(size: int) -> list[list[list[int]]]:
    """Groups of devices whose reduce-scatters, in turn, equal one over all devices.

    The TPU compiler turns a reduce-scatter over a whole slice into an all-reduce of
    which each chip keeps a shard, and does the same to an all-gather if the slice has
    three axes.  This doubles the bytes.  It does not do so over groups.  So gradients
    are reduced first over devices that are `inner` apart, then over adjacent ones;
    all-gathers use the reverse order.
    """
    inner = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    outer = size // inner
    apart = [[i + inner * k for k in range(outer)] for i in range(inner)]
    adjacent = [[i * inner + k for k in range(inner)] for i in range(outer)]
    return [apart, adjacent] if inner > 1 else [apart]


def linear_vjp(
    function: Callable,
    transpose: Callable,
    weight: Float[Array, "*shape"],
    dtype: Any,
) -> Float[Array, "..."]:
    """`function(weight)` in the precision of `dtype`; the gradient is not rounded.

    Args:
        function: a linear function without arithmetic, such as a gather or transpose.
        transpose: its transpose, applied to cotangents.
        weight: in the parameter dtype, which the result has too.  A cast of the result
            to `dtype` undoes the widening, so nothing is stored twice as wide.
        dtype: the dtype in which data is moved, if narrower than the weight's.
    """
    dtype = min(jnp.dtype(dtype), weight.dtype, key=lambda d: d.itemsize)

    @jax.custom_vjp
    def apply(weight):
        return function(weight.astype(dtype)).astype(weight.dtype)

    apply.defvjp(
        lambda weight: (apply(weight), None),
        lambda _, cotangent: (transpose(cotangent),),
    )
    return apply(weight)


def all_gather_per_row_group(
    weight: Float[Array, "*shape"], dtype: Any
) -> Float[Array, "N *shape"]:
    """A weight [V, D] or [D, V] as N copies, one per row group.

    This is FSDP's all-gather, in `dtype`.  Gradients, in the parameter dtype, are
    summed in one reduce-scatter.
    """
    if on_mesh(SPECS.embed) is None:
        return weight[None]
    spec = jax.typeof(weight).sharding.spec
    scatter = lambda gradients: reduce_scatter(gradients, spec)
    return linear_vjp(all_gather, scatter, weight, dtype)


def transpose_table(table: Float[Array, "N V D"], dtype: Any) -> Float[Array, "N D V"]:
    """Turns the copies of a tied embedding into copies of the head."""
    swap = lambda table: reshard(jnp.swapaxes(table, 1, 2), SPECS.row_group_copies)
    return linear_vjp(swap, swap, table, dtype)


def embedding_lookup(
    table: Float[Array, "N V D"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
    """The tokens' embeddings in `dtype`, from one copy of the table per row group.

    Gradients are summed in the dtype of the table.
    """
    size, wide = table.shape[1], table.dtype

    @jax.custom_vjp
    def apply(table, tokens):
        return _on_each_device(
            lambda table, tokens: table[0].astype(dtype).at[tokens].get(),
            (SPECS.row_group_copies, SPECS.tokens),
            SPECS.features,
        )(table, tokens)

    def accumulate(tokens, cotangent):
        zeros = jnp.zeros((1, size, cotangent.shape[-1]), wide)
        return zeros.at[0, tokens].add(cotangent.astype(wide))

    def backward(tokens, cotangent):
        specs = SPECS.tokens, SPECS.features
        add = _on_each_device(accumulate, specs, SPECS.row_group_copies)
        return add(tokens, cotangent), None

    apply.defvjp(lambda table, tokens: (apply(table, tokens), tokens), backward)
    return apply(table, reshard(tokens, SPECS.tokens))


def _on_each_device(function: Callable, specs: tuple[P, ...], out: P) -> Callable:
    """Applies the function to each device's own shards, if a mesh is set."""
    out_specs, in_specs = on_mesh(out), tuple(map(on_mesh, specs))
    if out_specs is None:
        return function
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
