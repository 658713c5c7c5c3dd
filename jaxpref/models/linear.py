"""Products of activations and weights whose gradients transpose neither factor."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxpref.models.gathering import (
    all_gather,
    is_fsdp_sharded,
    num_row_groups,
    reduce_scatter,
    row_group_layout,
)
from jaxpref.models.layout import SPECS, on_mesh
from jaxpref.models.low_rank import LowRank, output_factors
from jaxpref.models.quantized import Quantized

PRODUCT = "product"
"""The name of the results in policies of `jax.checkpoint`."""


def dense_einsum(
    equation: str,
    x: Float[Array, "*inputs"],
    weight: Float[Array, "*weight"] | LowRank | Quantized,
    *,
    spec: P | None = None,
    out_dtype: Any = None,
) -> Float[Array, "*outputs"]:
    """`einsum(equation, x, weight)`: factors in x's dtype, sums in float32 or wider.

    For a `LowRank` weight, it is x W + s (x a) b; no array of the size of a b is made.
    With a magnitude, it is multiplied with `output_factors`.
    A `Quantized` one is dequantized in each pass, and never stored so.

    The gradients are einsums of the same kind,

        d/dx: out, weight -> x        d/dweight: x, out -> weight

    with the factors in this order.  JAX's own order for the weight is (out, x), for
    which XLA on CPU makes a transposed copy of `out`, the larger of the two.
    A weight that is sharded over fsdp is gathered in the dtype of x for the product and
    again for the gradient of x, and its own gradient is scattered; see `gathering`.
    Only the gradients that are asked for are computed: a frozen weight has none, and
    its x is not stored.  `jax.jvp` cannot differentiate this.  For a directional
    derivative, differentiate the function that `jax.vjp` returns.

    Args:
        equation: an einsum equation of one activation and one weight.  Each index
            occurs in two of the three terms; rows come first in the terms of the
            activation and the result.
        x: activations.
        weight: in the parameter dtype.  Its gradient has the same dtype, from sums that
            are never rounded to the dtype of x.  If it has one axis more than in the
            equation, that axis is one copy per row group.
        spec: layout of the result on the mesh that is set.
        out_dtype: dtype of the result, by default that of x.
    """
    if isinstance(weight, LowRank):
        result = _low_rank_product(equation, x, weight, spec, out_dtype)
    else:
        result = _product(equation, x, weight, spec, out_dtype)
    # Since products have a custom gradient, policies of jax.checkpoint apply to this
    # name and not to the product.
    result = checkpoint_name(result, PRODUCT)
    if isinstance(weight, LowRank) and weight.magnitude is not None:
        result *= output_factors(weight).astype(result.dtype)
    return result


def _low_rank_product(
    equation: str, x: jax.Array, weight: LowRank, spec: P | None, out_dtype: Any
) -> jax.Array:
    down, up = factored(equation)
    kept = x if weight.dropout is None else weight.dropout(x)
    inner = dense_einsum(down, kept, weight.a, spec=SPECS.hidden)
    # Scaled here, where it is smallest, in both passes.
    inner *= jnp.asarray(weight.scale, inner.dtype)
    change = _product(up, inner, weight.b, spec, out_dtype)
    return _product(equation, x, weight.weight, spec, out_dtype) + change


def factored(equation: str) -> tuple[str, str]:
    """The products of x with a, and of the result with b, for W = a b of rank r.

    "btd,dhk->bthk" gives "btd,dr->btr" and "btr,rhk->bthk".
    """
    terms, out = equation.split("->")
    of_x, of_weight = terms.split(",")
    inputs = "".join(i for i in of_weight if i in of_x)
    outputs = "".join(i for i in of_weight if i in out)
    kept = "".join(i for i in of_x if i not in inputs)
    return f"{of_x},{inputs}r->{kept}r", f"{kept}r,r{outputs}->{out}"


def _quantized_product(
    equation: str, x: jax.Array, weight: Quantized, spec: P | None, out_dtype: Any
) -> jax.Array:
    terms, out = equation.split("->")
    of_x, of_weight = terms.split(",")
    to_x = f"{out},{of_weight}->{of_x}"
    dtype, layout = x.dtype, on_mesh(jax.typeof(x).sharding.spec)
    einsum = functools.partial(_einsum, dtype)

    @jax.custom_vjp
    def apply(x, weight):
        return einsum(equation, x, weight.dequantized(dtype), out_dtype or dtype, spec)

    def backward(weight, cotangent):
        return einsum(to_x, cotangent, weight.dequantized(dtype), dtype, layout), None

    apply.defvjp(lambda x, weight: (apply(x, weight), weight), backward)
    return apply(x, weight)


def _product(
    equation: str,
    x: jax.Array,
    weight: jax.Array | Quantized,
    spec: P | None,
    out_dtype: Any,
) -> jax.Array:
    if isinstance(weight, Quantized):
        return _quantized_product(equation, x, weight, spec, out_dtype)
    terms, out = equation.split("->")
    of_x, of_weight = terms.split(",")
    out_dtype = out_dtype or x.dtype
    layout: Any = lambda like: on_mesh(jax.typeof(like).sharding.spec)
    copied = weight.ndim > len(of_weight)
    sharded = not copied and is_fsdp_sharded(weight)
    gradient_spec = row_group_layout(layout(weight)) if sharded else layout(weight)
    whole_spec, rows = spec, x.shape[0]
    if copied or sharded:
        of_x, of_weight, out = (f"n{term}" for term in (of_x, of_weight, out))
        groups = weight.shape[0] if copied else num_row_groups()
        split = (groups, rows // groups, *x.shape[1:])
        x = jnp.reshape(x, split, out_sharding=on_mesh(_by_row_group(layout(x))))
        spec = _by_row_group(spec)

    # The same precision in both passes, whatever the cotangents' dtype.
    einsum = functools.partial(_einsum, x.dtype)
    whole = lambda weight: all_gather(weight.astype(x.dtype)) if sharded else weight

    @jax.custom_vjp
    def apply(x, weight):
        to_out = f"{of_x},{of_weight}->{out}"
        return einsum(to_out, x, whole(weight), out_dtype, spec)

    to_x, to_weight = f"{out},{of_weight}->{of_x}", f"{of_x},{out}->{of_weight}"
    x_dtype, x_layout = x.dtype, layout(x)
    weight_dtype, weight_layout = weight.dtype, layout(weight)

    def forward(x, weight):
        # The other factor is stored only for a gradient that is asked for.
        saved = (
            x.value if weight.perturbed else None,
            weight.value if x.perturbed else None,
        )
        return apply(x.value, weight.value), saved

    def gradient_of_weight(x, cotangent):
        dweight = einsum(to_weight, x, cotangent, weight_dtype, gradient_spec)
        if x_dtype != weight_dtype:
            # XLA on CPU has no float32 product of bfloat16 factors with a transposed
            # result, as a tied embedding's gradient is, and would widen the factors.
            dweight = jax.lax.optimization_barrier(dweight)
        return reduce_scatter(dweight, weight_layout) if sharded else dweight

    def backward(saved, cotangent):
        x, weight = saved
        dweight = None if x is None else gradient_of_weight(x, cotangent)
        if weight is None:
            return None, dweight
        return einsum(to_x, cotangent, whole(weight), x_dtype, x_layout), dweight

    apply.defvjp(forward, backward, symbolic_zeros=True)
    result = apply(x, weight)
    if copied or sharded:
        shape = (rows, *result.shape[2:])
        result = jnp.reshape(result, shape, out_sharding=on_mesh(whole_spec))
    return result


def _einsum(
    factor_dtype: Any,
    equation: str,
    a: jax.Array,
    b: jax.Array,
    dtype: Any,
    spec: P | None,
) -> jax.Array:
    a, b = a.astype(factor_dtype), b.astype(factor_dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    result = jnp.einsum(
        equation, a, b, preferred_element_type=wide, out_sharding=on_mesh(spec)
    )
    return result.astype(dtype)


def _by_row_group(spec: P | None) -> P | None:
    """The layout of [N, B / N, ...], given that of [B, ...]."""
    return None if spec is None else P(spec[0], None, *spec[1:])
