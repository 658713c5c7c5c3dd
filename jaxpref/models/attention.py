"""Attention, and the choice of implementation.

Axes: B rows, T tokens, S key slots, H query heads, G key-value heads, K head features.
Query head h reads key head h // (H / G); scores are scaled by 1/sqrt(K).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models.attention_kernels import causal_kernel, packed_kernel, visible
from jaxpref.models.blockwise import BLOCK, blockwise_attention
from jaxpref.models.dense_attention import NEVER, attention, cap_scores
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


def reach_of(
    window: int | None, sliding: Bool[Array, ""] | bool, length: int
) -> Int[Array, ""] | None:
    """How many tokens a token sees, with itself; None if that is all earlier ones.

    Args:
        window: the sliding window.
        sliding: whether it applies; may differ by layer within a scan.
        length: the number of tokens in a row.
    """
    if window is None or window >= length:
        return None
    return jnp.where(sliding, window, length).astype(jnp.int32)


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    lengths: Int[Array, " B"] | None = None,
    sliding: Bool[Array, ""] | bool = True,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    twice_differentiable: bool = False,
) -> Float[Array, "B T H K"]:
    """Causal attention in whole rows.

    Args:
        q: queries.
        k: keys.
        v: values.
        lengths: the number of real tokens in each row, padded on the right.  Results
            for padding are then meaningless, and may not be computed.
        sliding: whether the window applies.
        window: the number of tokens, with itself, to which a token attends; None for
            all earlier ones.
        soft_cap: of the scores, see `Architecture`.
        twice_differentiable: as in `Numerics`.
    """
    B, T = q.shape[:2]
    reach, slots = reach_of(window, sliding, T), jnp.arange(T)
    dense = functools.partial(attention, soft_cap=soft_cap)
    mask = None
    if reach is not None:
        distances = slots[:, None] - slots
        mask = ((distances >= 0) & (distances < reach))[None, None]
    if twice_differentiable:
        return dense(q, k, v, mask)
    if (kernel := causal_kernel(q, soft_cap)) is not None:
        windowed, whole = (
            functools.partial(_on_each_device, functools.partial(kernel, window=w))
            for w in (window, None)
        )
        if reach is None:
            return whole(q, k, v)
        # The window is part of the kernel, so layers of both kinds need two kernels.
        return jax.lax.cond(sliding, windowed, whole, q, k, v)
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
        return dense(q, k, v, mask)
    parts = jnp.zeros((B, T), jnp.int32, out_sharding=on_mesh(SPECS.tokens))
    ids = parts
    if lengths is not None:
        ids = jnp.where(slots < lengths[:, None], parts, -1)
    kernel = functools.partial(blockwise_attention, soft_cap=soft_cap)
    within = () if reach is None else (parts + slots, reach)
    return _on_each_device(kernel, q, k, v, ids, parts, *within)


def packed_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segments: Segments,
    positions: Int[Array, "B T"] | None = None,
    sliding: Bool[Array, ""] | bool = True,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
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
        positions: positions of the tokens in their texts, needed for a window.
        sliding: whether the window applies.
        window: as in `causal_attention`, counted in positions.
        soft_cap: of the scores, see `Architecture`.
        twice_differentiable: as in `Numerics`.
    """
    ids, parts, completions = segments
    T = q.shape[1]
    reach = reach_of(window, sliding, T)
    within: Any = () if reach is None else (positions, reach)
    if twice_differentiable:
        mask = visible(ids, parts, *within) & jnp.tri(T, dtype=bool)
        return attention(q, k, v, mask, soft_cap=soft_cap)
    static = None if reach is None else window
    kernel = packed_kernel(q, window=static, soft_cap=soft_cap)
    if kernel is None:
        kernel = functools.partial(blockwise_attention, soft_cap=soft_cap)
    else:
        kernel = functools.partial(kernel, completions=completions)
    return _on_each_device(kernel, q, k, v, ids, parts, *within)


def cached_attention(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 G K"],
    v: Float[Array, "B 1 G K"],
    keys: Float[Array, "L B G S K"],
    values: Float[Array, "L B G S K"],
    layer: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
    *,
    soft_cap: float | None = None,
) -> tuple[
    Float[Array, "B 1 H K"], Float[Array, "L B G S K"], Float[Array, "L B G S K"]
]:
    """Attention of one token of each row to itself and the tokens in the cache.

    Args:
        q: queries.
        k: keys of the tokens.
        v: their values.
        keys: of earlier tokens, see `cache.Stack`: token t is in slot t mod S.
        values: the same.
        layer: the number of the layer in the cache.
        lengths: the number of earlier tokens in each row.
        soft_cap: of the scores, see `Architecture`.

    Returns:
        The result, and the cache with the new tokens.
    """
    compute = functools.partial(_cached_attention, soft_cap=soft_cap)
    layer = jnp.asarray(layer, jnp.int32)
    if (heads := on_mesh(SPECS.heads)) is None:
        return compute(q, k, v, keys, values, layer, lengths)
    cache, rows = on_mesh(SPECS.cache), on_mesh(SPECS.rows)
    specs = (heads, heads, heads, cache, cache, P(), rows)
    mapped = jax.shard_map(
        compute, in_specs=specs, out_specs=(heads, cache, cache), check_vma=False
    )
    return mapped(q, k, v, keys, values, layer, lengths)


def _cached_attention(q, k, v, keys, values, layer, lengths, *, soft_cap):
    (B, _, H, K), (G, S) = q.shape, keys.shape[2:4]
    rows = jnp.arange(B)
    keys = keys.at[layer, rows, :, lengths % S].set(k[:, 0])
    values = values.at[layer, rows, :, lengths % S].set(v[:, 0])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    scores = product("bgrk,bgsk->bgrs", q.reshape(B, G, H // G, K), keys[layer])
    scores = cap_scores(scores * K**-0.5, soft_cap)
    # A ring that is full holds exactly the tokens within the window.
    held = jnp.arange(S) <= lengths[:, None]
    weights = jax.nn.softmax(jnp.where(held[:, None, None], scores, NEVER), axis=-1)
    out = product("bgrs,bgsk->bgrk", weights.astype(v.dtype), values[layer])
    return out.astype(q.dtype).reshape(B, 1, H, K), keys, values


def _on_each_device(kernel: Callable, *arrays: jax.Array) -> jax.Array:
    """Attention [B, T, H, K] of each device's own rows and heads."""
    if (heads := on_mesh(SPECS.heads)) is None:
        return kernel(*arrays)
    spec_by_rank = {4: heads, 2: on_mesh(SPECS.tokens), 0: P()}
    specs = tuple(spec_by_rank[x.ndim] for x in arrays)
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(*arrays)
