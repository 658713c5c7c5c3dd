"""Products of rows that are sorted by expert with the matrices of the experts.

They are `jax.lax.ragged_dot`, which on TPU is a grouped product.  On other platforms,
XLA masks and multiplies by all E experts: correct, but E times the work.

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
) -> Float[Array, "M outputs"]:
    """Each expert's rows times its matrix: factors in x's dtype, sums in float32.

    The gradient of the weight is in its own dtype, from sums that are never rounded to
    the dtype of x.  As with `dense_einsum`, `jax.jvp` cannot differentiate this.

    Args:
        x: rows sorted by expert.
        weight: in the parameter dtype.
        sizes: the number of rows of each expert.
        out_dtype: dtype of the result, by default that of x.
    """
    out_dtype = out_dtype or x.dtype

    def apply(x, weight, sizes):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        weight = weight.astype(x.dtype)
        out = jax.lax.ragged_dot(x, weight, sizes, preferred_element_type=wide)
        return out.astype(out_dtype)

    def backward(saved, cotangent):
        x, weight, sizes = saved
        cotangent = cotangent.astype(x.dtype)
        dx = grouped_product(cotangent, jnp.swapaxes(weight, 1, 2), sizes)
        return dx, products_by_group(x, cotangent, sizes, weight.dtype), None

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
        if platform() == "tpu" and x.dtype in (jnp.bfloat16, jnp.float32):
            return by_group_on_tpu(x, y, sizes).astype(dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        out = jax.lax.ragged_dot_general(
            x, y, sizes, BY_GROUP, preferred_element_type=wide
        )
        return out.astype(dtype)

    def backward(saved, cotangent):
        x, y, sizes = saved
        dx = grouped_product(y, jnp.swapaxes(cotangent, 1, 2), sizes)
        return dx, grouped_product(x, cotangent, sizes), None

    apply = jax.custom_vjp(apply)
    apply.defvjp(lambda *args: (apply(*args), args), backward)
    return apply(x, y, sizes)


def by_group_on_tpu(
    x: Float[Array, "M a"],
    y: Float[Array, "M b"],
    sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E a b"]:
    """`products_by_group` in float32, by the kernel of MegaBlocks for TPUs.

    The TPU compiler would mask and multiply all M rows for each expert.

    Source: Gale et al. 2022, arXiv:2211.15841, section 5.1.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = [min(TILE, n + -n % LANES) for n in (*x.shape, y.shape[1])]
    rows = -x.shape[0] % tiles[0]
    x, y = (jnp.pad(rows_of, ((0, rows), (0, 0))) for rows_of in (x, y))
    sizes = sizes.at[-1].add(rows)  # of zeros, which add nothing
    tiling = (tiles[0], tiles[1], tiles[2])
    return tgmm(x.T, y, sizes, jnp.float32, tiling, interpret=interpret)


TILE, LANES = 512, 128
"""The largest tile of the kernel, and the width of a vector register."""
BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""[M, a] and [M, b] to [E, a, b]: a product for each group of rows."""
