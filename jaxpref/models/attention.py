"""Attention, and the choice of implementation.

Axes: B rows, T tokens, S key slots, H query heads, G key-value heads, K head features.
Query head h reads key head h // (H / G); scores are scaled by 1/sqrt(K).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models.attention_kernels import causal_kernel, packed_kernel, visible
from jaxpref.models.blockwise import BLOCK, NEVER, blockwise_attention
from jaxpref.models.layout import SPECS, on_mesh, platform


class Segments(NamedTuple):
    """The prompts and completions to which the tokens of packed rows belong."""

    prompt_ids: Int[Array, "B T"]
    """Equal for all tokens of a prompt and its completions, which are adjacent;
    negative for padding."""
    parts: Int[Array, "B T"]
    """0 for a prompt; 1, 2, ... for its completions."""
    completions: int = 2
    """Maximum number of completions of a prompt, for the TPU kernel."""


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "B 1 T S"] | None,
) -> Float[Array, "B T H K"]:
    """Dense attention, with all scores [B, H, T, S] in memory; mask None is causal."""
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)
    # The softmax of that function is always float32, and float64 is used to check
    # everything else to many digits.
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    grouped = jnp.reshape(q, (B, T, G, H // G, K), out_sharding=on_mesh(SPECS.groups))
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k) * K**-0.5
    seen = jnp.tri(T, S, dtype=bool) if mask is None else mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, NEVER), axis=-1)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v)
    return jnp.reshape(out, (B, T, H, K), out_sharding=on_mesh(SPECS.heads))


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    lengths: Int[Array, " B"] | None = None,
    *,
    twice_differentiable: bool = False,
) -> Float[Array, "B T H K"]:
    """Causal attention in whole rows.

    Args:
        q: queries.
        k: keys.
        v: values.
        lengths: the number of real tokens in each row, padded on the right.  Results
            for padding are then meaningless, and may not be computed.
        twice_differentiable: as in `Numerics`.
    """
    if twice_differentiable:
        return attention(q, k, v, None)
    if (kernel := causal_kernel(q)) is not None:
        return _on_each_device(kernel, q, k, v)
    B, T = q.shape[:2]
    # Rows of one block gain nothing.  Gradients of dense and of blockwise attention on
    # two busy cores, in milliseconds, and MiB of temporary arrays:
    #
    #               16 rows, 8 heads of 8          4 rows, 9 heads of 64
    #      T      dense       blockwise          dense       blockwise
    #     64       4,    8        4,  1           3,   3        7,  3
    #    128      27,   32       12,  2          18,   9        9,  4
    #    512    1007,  513      216,  7         738, 146       89, 16
    #   1024    9832, 2051      847, 14        3615, 579     1337, 31
    if platform() != "cpu" or T <= BLOCK:
        return attention(q, k, v, None)
    parts = jnp.zeros((B, T), jnp.int32, out_sharding=on_mesh(SPECS.tokens))
    ids = parts
    if lengths is not None:
        ids = jnp.where(jnp.arange(T) < lengths[:, None], parts, -1)
    return _on_each_device(blockwise_attention, q, k, v, ids, parts)


def packed_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segments: Segments,
    *,
    twice_differentiable: bool = False,
) -> Float[Array, "B T H K"]:
    """Attention of packed rows: tokens attend to their prompt and own completion.

    More precisely, a token attends to itself and to the earlier tokens of its own part
    and of part 0 of the same prompt.  Results for padding are meaningless.

    Args:
        q: queries.
        k: keys.
        v: values.
        segments: the prompt and part of each token.
        twice_differentiable: as in `Numerics`.
    """
    ids, parts, completions = segments
    if twice_differentiable:
        T = q.shape[1]
        mask = visible(ids, parts) & jnp.tri(T, dtype=bool)
        return attention(q, k, v, mask)
    kernel = packed_kernel(q)
    if kernel is None:
        kernel = blockwise_attention
    else:
        kernel = functools.partial(kernel, completions=completions)
    return _on_each_device(kernel, q, k, v, ids, parts)


def _on_each_device(kernel: Callable, *arrays: jax.Array) -> jax.Array:
    """Attention [B, T, H, K] of each device's own rows and heads."""
    if (heads := on_mesh(SPECS.heads)) is None:
        return kernel(*arrays)
    specs = tuple(heads if x.ndim == 4 else on_mesh(SPECS.tokens) for x in arrays)
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(*arrays)
