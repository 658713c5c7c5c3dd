"""Mixtures of experts without dropped tokens.

Each device sorts its own tokens by expert and multiplies each expert's tokens by that
expert's matrices; F is sharded over the `tensor` axis.  If the mesh has an axis
`expert`, a device computes its own experts only; see `expert_parallel`.

Axes: B rows, T tokens, M = B T tokens of a device, D hidden, F feed-forward features,
E experts, k experts of a token, N row groups (see `gathering`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpref.models.expert_parallel import mixture_over_experts
from jaxpref.models.gathering import (
    all_gather_per_row_group,
    linear_vjp,
    num_row_groups,
    row_group_layout,
)
from jaxpref.models.grouped import grouped_product
from jaxpref.models.layout import SPECS, num_parts, on_mesh, reshard

WIDE_IN, WIDE_OUT = P("expert", None, "tensor"), P("expert", "tensor", None)
"""The layouts of experts' matrices in use, gathered over fsdp."""


class RouterSums(NamedTuple):
    """What a router did, summed over tokens, each times its weight, and over layers."""

    choices: Float[Array, " E"]
    """How often each expert was among the k most likely ones."""
    probabilities: Float[Array, " E"]
    """The probabilities of the experts."""
    tokens: Float[Array, ""]
    """The weights."""


def router_sums(
    probabilities: Float[Array, "B T E"],
    weights: Float[Array, "B T"],
    *,
    per_token: int,
) -> RouterSums:
    """The sums of one layer, over the tokens of all devices; float32 or wider.

    Args:
        probabilities: p, as in `mixture`.
        weights: how often each token counts; 0 for padding.
        per_token: k.
    """
    weights = reshard(weights.astype(probabilities.dtype), SPECS.tokens)

    def choices(p: jax.Array, weights: jax.Array) -> jax.Array:
        experts = jax.lax.top_k(p, per_token)[1]
        chosen = experts[..., None] == jnp.arange(p.shape[-1])
        return jnp.where(jnp.any(chosen, 2), weights[..., None], 0)

    rows = on_mesh(SPECS.hidden)
    if rows is not None:
        specs = rows, on_mesh(SPECS.tokens)
        choices = jax.shard_map(choices, in_specs=specs, out_specs=rows)
    chosen = choices(jax.lax.stop_gradient(probabilities), weights)
    summed = jnp.sum(probabilities * weights[..., None], (0, 1))
    return RouterSums(jnp.sum(chosen, (0, 1)), summed, jnp.sum(weights))


def mixture(
    h: Float[Array, "B T D"],
    probabilities: Float[Array, "B T E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    per_token: int,
    normalized: bool,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> Float[Array, "B T D"]:
    """The weighted sum of the outputs of each token's most likely experts.

        out = sum over the k largest p_e of p_e down_e(activation(gate_e(h)) * up_e(h))

    No token is dropped, so the output of a token does not depend on other tokens.
    The sum over experts is in float32 or wider.

    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1.

    Args:
        h: the inputs.
        probabilities: p, the softmax of the router's logits, float32 or wider.
        gate: the experts' first matrices, in the parameter dtype.
        up: the same.
        down: the experts' last matrices.
        per_token: k.
        normalized: whether the k probabilities are divided by their sum.
        activation: of the gate.
    """
    chosen = functools.partial(_chosen, per_token=per_token, normalized=normalized)
    if on_mesh(SPECS.hidden) is None:
        parts = h.reshape(-1, h.shape[-1]), *chosen(probabilities), (gate, up, down)
        return _mixture(*parts, activation=activation).reshape(h.shape).astype(h.dtype)
    specs = WIDE_IN, WIDE_IN, WIDE_OUT
    weights = zip((gate, up, down), specs, strict=True)
    gathered = [_gathered(weight, spec, h.dtype) for weight, spec in weights]
    copied = num_row_groups() > 1
    one = (lambda weight: weight[0]) if copied else (lambda weight: weight)
    layout = row_group_layout if copied else on_mesh
    compute = mixture_over_experts if num_parts(("expert",)) > 1 else _mixture

    def on_each_device(h, probabilities, *weights):
        B, T, D = h.shape
        scores, experts = chosen(probabilities)
        weights = tuple(map(one, weights))
        tokens = h.reshape(-1, D)
        part = compute(tokens, scores, experts, weights, activation=activation)
        return jax.lax.psum(part, "tensor").reshape(B, T, D)

    rows = on_mesh(SPECS.hidden)
    summed = jax.shard_map(
        on_each_device,
        in_specs=(rows, rows, *map(layout, specs)),
        out_specs=rows,
        check_vma=False,
    )(h, probabilities, *gathered)
    return summed.astype(h.dtype)


def _gathered(weight: jax.Array, spec: P, dtype: Any) -> jax.Array:
    """A weight gathered over fsdp, in `dtype`; its gradient is not rounded to that.

    If there are several row groups, these are N copies, one for each.
    """
    if num_row_groups() > 1:
        return all_gather_per_row_group(weight, dtype)
    stored = jax.typeof(weight).sharding.spec
    gather, scatter = (
        lambda x: reshard(x, spec),
        lambda gradient: reshard(gradient, stored),
    )
    return linear_vjp(gather, scatter, weight, dtype)


def _chosen(
    probabilities: Float[Array, "*axes E"], *, per_token: int, normalized: bool
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """The most likely experts of each token, and their weights."""
    p = probabilities.reshape(-1, probabilities.shape[-1])
    scores, experts = jax.lax.top_k(p, per_token)
    if normalized:
        scores = scores / jnp.sum(scores, -1, keepdims=True)
    return scores, experts


def _mixture(h, scores, experts, weights, *, activation):
    """The mixture on one device, [M, D]; a partial sum if F is sharded."""
    gate, up, down = weights
    per_token = scores.shape[1]
    experts = experts.reshape(-1)
    order = jnp.argsort(experts)
    sizes = jnp.sum(experts[:, None] == jnp.arange(len(gate)), 0, dtype=jnp.int32)
    rows = h[order // per_token]
    product = functools.partial(grouped_product, sizes=sizes)
    hidden = activation(product(rows, gate)) * product(rows, up)
    wide = jnp.promote_types(h.dtype, jnp.float32)
    out = product(hidden, down, out_dtype=wide)[jnp.argsort(order)]
    out = out.reshape(-1, per_token, h.shape[-1]) * scores[..., None].astype(wide)
    return jnp.sum(out, 1)
