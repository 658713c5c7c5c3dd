"""Attention with all scores in memory.

Axes: B rows, T queries, S keys, H query heads, G key-value heads, K head features.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.models.layout import SPECS, on_mesh

NEVER = -1e30
"""Used instead of minus infinity, whose differences are NaN."""


def cap_scores(
    scores: Float[Array, "*shape"], soft_cap: float | None
) -> Float[Array, "*shape"]:
    """C tanh(score / c), or the scores themselves without a soft cap c."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "*B 1 T S"] | None,
    *,
    soft_cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Dense attention, with all scores [B, H, T, S] in memory; mask None is causal."""
    if q.dtype != jnp.float64 and soft_cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)
    # That function has no soft cap, and its softmax is always float32; float64 is used
    # to check everything else to many digits.
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = jnp.reshape(q, (B, T, G, H // G, K), out_sharding=on_mesh(SPECS.groups))
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    scores = cap_scores(product("btgrk,bsgk->bgrts", grouped, k) * K**-0.5, soft_cap)
    seen = jnp.tri(T, S, dtype=bool) if mask is None else mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, NEVER), axis=-1)
    out = product("bgrts,bsgk->btgrk", weights.astype(v.dtype), v).astype(q.dtype)
    return jnp.reshape(out, (B, T, H, K), out_sharding=on_mesh(SPECS.heads))
