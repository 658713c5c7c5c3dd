"""Products of activations with weights, and gradients that transpose neither."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxpref.models.config import on_mesh
from jaxpref.models.gathering import gather, in_parts, of_copies, row_groups, scatter

PRODUCT = "product"
"""What policies of `jax.checkpoint` know the results by."""


def product(equation: str, x, weight, *, spec=None, out_dtype=None) -> jax.Array:
    """`einsum(equation, x, weight)`: factors in the dtype of x, sums at least float32.

    The slopes are einsums of the same kind,

        d/dx: out, weight -> x        d/dweight: x, out -> weight

    in this order of factors.  JAX's own order for the weight is (out, x), for which XLA
    on CPU writes a transposed copy of `out`, the larger of the two.
    A weight that is stored in parts is gathered in the dtype of x for the product and
    again for the slope of x, and its own slope is scattered; see `gathering`.
    `jax.jvp` cannot go through; a derivative along a direction is that of `jax.vjp`'s
    function in its own argument.

    Args:
        equation: of one activation and one weight, every index of which is in two of
            the three terms; rows come first in those of the activation and the result.
        x: activations.
        weight: in the parameter dtype; its gradient comes in that dtype, out of sums
            that were never rounded to the dtype of x.  With an axis more than the
            equation says: copies for as many groups of rows.
        spec: layout of the result on the mesh that is set.
        out_dtype: dtype of the result, by default that of x.
    """
    terms, out = equation.split("->")
    of_x, of_weight = terms.split(",")
    out_dtype = out_dtype or x.dtype
    layout = lambda like: on_mesh(jax.typeof(like).sharding.spec)
    copied = weight.ndim > len(of_weight)
    parted = not copied and in_parts(weight)
    of_slope = of_copies(layout(weight)) if parted else layout(weight)
    plain, rows = spec, x.shape[0]
    if copied or parted:
        of_x, of_weight, out = (f"n{term}" for term in (of_x, of_weight, out))
        groups = weight.shape[0] if copied else row_groups()
        split = (groups, rows // groups, *x.shape[1:])
        x = jnp.reshape(x, split, out_sharding=on_mesh(_split(layout(x))))
        spec = _split(spec)

    def einsum(equation, a, b, dtype, spec):
        # In the same precision forwards and backwards, whatever dtype slopes come in.
        a, b = a.astype(x.dtype), b.astype(x.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        found = jnp.einsum(
            equation, a, b, preferred_element_type=wide, out_sharding=on_mesh(spec)
        )
        return found.astype(dtype)

    whole = lambda weight: gather(weight.astype(x.dtype)) if parted else weight

    @jax.custom_vjp
    def apply(x, weight):
        to_out = f"{of_x},{of_weight}->{out}"
        return einsum(to_out, x, whole(weight), out_dtype, spec)

    def forward(x, weight):
        return apply(x, weight), (x, weight)

    def backward(kept, slope):
        x, weight = kept
        to_x, to_weight = f"{out},{of_weight}->{of_x}", f"{of_x},{out}->{of_weight}"
        dweight = einsum(to_weight, x, slope, weight.dtype, of_slope)
        if x.dtype != weight.dtype:
            # XLA on CPU has no float32 product of bfloat16 factors whose result is
            # turned, as that for a tied embedding is, and would make one of the two.
            dweight = jax.lax.optimization_barrier(dweight)
        if parted:
            dweight = scatter(dweight, layout(weight))
        return einsum(to_x, slope, whole(weight), x.dtype, layout(x)), dweight

    apply.defvjp(forward, backward)
    found = apply(x, weight)
    if copied or parted:
        shape = (rows, *found.shape[2:])
        found = jnp.reshape(found, shape, out_sharding=on_mesh(plain))
    # jax.checkpoint sees no product in a function with its own gradient, but its name.
    return checkpoint_name(found, PRODUCT)


def _split(spec: P | None) -> P | None:
    """The layout of [N, B / N, ...], of that of [B, ...]."""
    return None if spec is None else P(spec[0], None, *spec[1:])
