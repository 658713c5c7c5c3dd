"""Products of rows that are sorted by expert with the matrices of the experts.

On TPU, they are the kernels of MegaBlocks: the compiler has grouped products too, but
for v5e and v6e it masks and multiplies by all E experts (libtpu 0.0.52).  On other
platforms, they are `jax.lax.ragged_dot`, for which XLA does that as well: correct, but
E times the work.

Source: Gale et al. 2022, arXiv:2211.15841, section 5.1.

Axes: E experts, M rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpref.models.layout import platform
from jaxpref.models.linear import PRODUCT


def grouped_product(
    x: Float[Array, "M inputs"],
    weight: Float[Array, "E inputs outputs"],
    sizes: Int[Array, " E"],
    out_dtype: Any = None,
    *,
    transposed: bool = False,
) -> Float[Array, "M outputs"]:
    """Each expert's rows times its matrix: factors in x's dtype, sums in float32.

    The gradient of the weight is in its own dtype, from sums that are never rounded to
    the dtype of x.  As with `dense_einsum`, `jax.jvp` cannot differentiate this.

    Args:
        x: rows sorted by expert.
        weight: in the parameter dtype.
        sizes: the number of rows of each expert, M in total.
        out_dtype: dtype of the result, by default that of x.
        transposed: whether the matrices are transposed, [E, outputs, inputs].
    """
    out_dtype = out_dtype or x.dtype

    def apply(x, weight, sizes):
        weight = weight.astype(x.dtype)
        if _has_kernel(x):
            out = by_row_on_tpu(x, weight, sizes, transposed=transposed)
        else:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            weight = jnp.swapaxes(weight, 1, 2) if transposed else weight
            out = jax.lax.ragged_dot(x, weight, sizes, preferred_element_type=wide)
        return out.astype(out_dtype)

    def backward(saved, cotangent):
        x, weight, sizes = saved
        cotangent = cotangent.astype(x.dtype)
        dx = grouped_product(cotangent, weight, sizes, transposed=not transposed)
        pair = (cotangent, x) if transposed else (x, cotangent)
        return dx, products_by_group(*pair, sizes, weight.dtype), None

    apply = jax.custom_vjp(apply)
    apply.defvjp(lambda *args: (apply(*args), args), backward)
    return checkpoint_name(apply(x, weight, sizes), PRODUCT)


def products_by_group(
    x: Float[Array, "M a"], y: Float[Array, "M b"], sizes: Int[Array, " E"], dtype: Any
) -> Float[Array, "E a b"]:
    """Products x^T y of each expert's rows, in `dtype`.

    They have derivatives of any order, which JAX's own do not.
    """

    def apply(x, y, sizes):
        if _has_kernel(x):
            return by_group_on_tpu(x, y, sizes).astype(dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        out = jax.lax.ragged_dot_general(
            x, y, sizes, BY_GROUP, preferred_element_type=wide
        )
        return out.astype(dtype)

    def backward(saved, cotangent):
        x, y, sizes = saved
        dx = grouped_product(y, cotangent, sizes, transposed=True)
        return dx, grouped_product(x, cotangent, sizes), None

    apply = jax.custom_vjp(apply)
    apply.defvjp(lambda *args: (apply(*args), args), backward)
    return apply(x, y, sizes)


def _has_kernel(x: jax.Array) -> bool:
    return platform() == "tpu" and x.dtype in (jnp.bfloat16, jnp.float32)


def by_row_on_tpu(
    x: Float[Array, "M inputs"],
    weight: Float[Array, "E inputs outputs"],
    sizes: Int[Array, " E"],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "M outputs"]:
    """`grouped_product` in float32, by a kernel that reads each row once."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    outputs = weight.shape[1 if transposed else 2]
    tiling, (x,), sizes, rows = _tiled((x,), sizes, outputs)
    options = dict(transpose_rhs=transposed, interpret=interpret)
    return gmm(x, weight, sizes, jnp.float32, tiling, **options)[:rows]


def by_group_on_tpu(
    x: Float[Array, "M a"],
    y: Float[Array, "M b"],
    sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E a b"]:
    """`products_by_group` in float32, by a kernel that reads each row once."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling, (x, y), sizes, _ = _tiled((x, y), sizes, y.shape[1])
    return tgmm(x.T, y, sizes, jnp.float32, tiling, interpret=interpret)


def _tiled(
    arrays: tuple[jax.Array, ...], sizes: jax.Array, outputs: int
) -> tuple[tuple[int, int, int], list[jax.Array], jax.Array, int]:
    """The kernel's tiles; the arrays, padded to whole tiles of rows; sizes; and M.

    The rows added are zeros and count as rows of the last expert.
    """
    rows, inputs = arrays[0].shape
    tiles = [min(TILE, n + -n % LANES) for n in (rows, inputs, outputs)]
    more = -rows % tiles[0]
    padded = [jnp.pad(x, ((0, more), (0, 0))) for x in arrays]
    return (tiles[0], tiles[1], tiles[2]), padded, sizes.at[-1].add(more), rows


TILE, LANES = 512, 128
"""The largest tile of the kernels, and the width of a vector register."""
BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""[M, a] and [M, b] to [E, a, b]: a product for each group of rows."""
