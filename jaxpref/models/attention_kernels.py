"""Attention kernels for accelerators, from jax, and the choice of one.

TPU: splash attention.  A token attends only to keys of its own segment, but a prompt
would have to be in the segments of all its completions.  So the keys are passed once
per completion: in copy c, prompts are in the segment of completion c.  Blocks of keys
to which no query attends are neither fetched nor multiplied.  Windows count slots of
the row, so with a window, a copy has the prompts right before their completion c.
GPU: cuDNN's flash attention.  Packed rows need a mask, whose memory grows with the
square of the row length, and only keys after a query are skipped.  jax 0.10 also
computes gradients of the mask; 0.12 does not.  (jax's Pallas kernel for GPUs supports
segments, but needs as many keys as queries, and no shared key heads.)
With a soft cap, there is no kernel on GPU, and all scores are in memory.
Splash attention has not been run on a TPU yet, only interpreted and compiled for one.
None of these kernels has second derivatives.

Axes: B rows, T tokens, H query heads, G key-value heads, K head features, C completions
of a prompt, N blocks of queries and M of keys.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models.dense_attention import attention
from jaxpref.models.layout import platform

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B T G K"]
PerToken = Int[Array, "B T"]
Copies = list[tuple[PerToken, PerToken | None]]
"""The segments of a copy's keys, and the slots from which they are taken."""

LANES = 128
"""The width of a vector register; splash attention needs rows of a multiple of it."""
BLOCKS = (512, 256, 128)
"""Tokens per block on TPU: the first that divides the row, since each step of the grid
has a fixed cost.  Not yet measured on a TPU."""


def causal_kernel(q: Queries, soft_cap: float | None = None) -> Callable | None:
    """The kernel `(q, k, v, window=)` for whole rows; None if the platform has none."""
    where = platform()
    if where == "tpu" and _splash_takes(q):
        return _capped(splash, soft_cap)
    return cudnn if where == "gpu" and _cudnn_takes(q, soft_cap) else None


def packed_kernel(
    q: Queries, *, window: int | None = None, soft_cap: float | None = None
) -> Callable | None:
    """The kernel for packed rows, called like `splash_packed`; None for blockwise."""
    where = platform()
    if where == "tpu" and _splash_takes(q):
        kernel = splash_packed
        if window is not None:
            kernel = functools.partial(kernel, window=window)
        return _capped(kernel, soft_cap)
    if where == "gpu" and q.dtype != jnp.float64:
        if _cudnn_takes(q, soft_cap):
            return cudnn_packed
        return _capped(dense_packed, soft_cap)
    return None


def _capped(kernel: Callable, soft_cap: float | None) -> Callable:
    return kernel if soft_cap is None else functools.partial(kernel, soft_cap=soft_cap)


# ---- TPU ---------------------------------------------------------------------------


def _splash_takes(q: Queries) -> bool:
    return q.dtype in (jnp.bfloat16, jnp.float32)


def splash(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Queries:
    """Causal attention of whole rows."""
    T, H = q.shape[1:3]
    q, k, v = _by_head(_scaled(q)), _by_head(k), _by_head(v)
    kernel = _make_splash(
        H, q.shape[2], 1, window=window, soft_cap=soft_cap, interpret=interpret
    )
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :T]


def splash_packed(
    q: Queries,
    k: Keys,
    v: Keys,
    prompt_ids: PerToken,
    parts: PerToken,
    positions: PerToken | None = None,
    reach: Int[Array, ""] | None = None,
    *,
    completions: int = 2,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Queries:
    """Attention of packed rows, see `attention.packed_attention`.

    A token of a part beyond `completions` gets NaN, not the result of another part.
    `window` is static; it applies if `reach` is equal to it.
    """
    T, H = q.shape[1:3]
    beyond = parts > completions
    q, k, v = _by_head(_scaled(q)), _by_head(k), _by_head(v)
    make = functools.partial(
        _make_splash,
        H,
        q.shape[2],
        completions,
        soft_cap=soft_cap,
        interpret=interpret,
    )
    pad = ((0, 0), (0, q.shape[2] - T))
    prompt_ids = jnp.pad(prompt_ids, pad, constant_values=-1)
    parts = jnp.pad(parts, pad)
    # Padding attends to itself; in the copies, queries attend only to prompts.
    padding, never = -1 - jnp.arange(q.shape[2]), -1 - q.shape[2]
    first = completions * prompt_ids
    own = jnp.where(prompt_ids < 0, padding, first + jnp.maximum(parts - 1, 0))
    others = range(1, completions)

    def whole():
        is_prompt = (prompt_ids >= 0) & (parts == 0)
        copies: Copies
        copies = [(jnp.where(is_prompt, first + c, never), None) for c in others]
        return _packed_rows(make(), q, k, v, own, copies)

    def windowed():
        assert positions is not None
        at = jnp.pad(positions, pad)
        placed = [_placed(prompt_ids, parts, at, c + 1) for c in others]
        copies: Copies = [
            (jnp.where(inside, first + c, never), source)
            for c, (inside, source) in zip(others, placed, strict=True)
        ]
        return _packed_rows(make(window=window), q, k, v, own, copies)

    if window is None or reach is None:
        out = whole()
    else:
        out = jax.lax.cond(reach <= window, windowed, whole)
    return jnp.where(beyond[..., None, None], jnp.nan, out.swapaxes(1, 2)[:, :T])


def _packed_rows(
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own: PerToken,
    copies: Copies,
) -> jax.Array:
    """Attention of each row's queries to copies of its keys and to the keys.

    Args:
        kernel: from `_make_splash`.
        q: queries [B, H, T, K].
        k: keys [B, G, T, K].
        v: values.
        own: the segments of queries and keys.
        copies: for each copy, the segments of its keys, and the slots from which they
            are taken, by default their own.
    """

    def row(q, k, v, own, copies):
        # The copies come first, so that all of them lie before every query.
        taken = lambda x: [x if at is None else x[:, at] for _, at in copies]
        with_copies = lambda x: jnp.concatenate([*taken(x), x], axis=1)
        keys = jnp.concatenate([*(ids for ids, _ in copies), own])
        ids = _splash().SegmentIds(own, keys)
        return _skip_blocks(kernel, own, keys)(q, with_copies(k), with_copies(v), ids)

    return jax.lax.map(lambda x: row(*x), (q, k, v, own, copies))


def _placed(
    prompt_ids: PerToken, parts: PerToken, positions: PerToken, part: int
) -> tuple[Bool[Array, "B T"], PerToken]:
    """A copy of the keys in which prompts lie right before a part of theirs.

    Differences of slots between the part and its prompt are then those of positions.

    Returns:
        Whether a prompt's token is at each slot, and from which slot it is taken.
    """
    slots = jnp.arange(prompt_ids.shape[1])
    before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=-2)
    new_prompt = prompt_ids != before(prompt_ids)
    starts = (new_prompt | (parts != before(parts))) & (parts == part)
    following = jnp.where(starts & (prompt_ids >= 0), slots, len(slots))
    following = jax.lax.cummin(following, axis=1, reverse=True)
    # The part's first token at a later slot; its position is the prompt's length.
    following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=len(slots))
    at = jnp.minimum(following, len(slots) - 1)
    length = jnp.take_along_axis(positions, at, 1)
    same = jnp.take_along_axis(prompt_ids, at, 1) == prompt_ids
    begin = jax.lax.cummax(jnp.where(new_prompt, slots, 0), axis=1)
    shift = following - length
    inside = (following < len(slots)) & same & (slots >= shift)
    return inside, jnp.where(inside, slots - shift + begin, slots)


def _splash() -> Any:
    # Slow to import, and only needed on TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _scaled(q: Queries) -> Queries:
    """Queries divided by sqrt(K), which the kernel does not do itself."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _by_head(x: jax.Array) -> jax.Array:
    """[B, T, H, K] to [B, H, T, K], with rows padded to whole registers."""
    padding = -x.shape[1] % LANES
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)


def _make_splash(
    H: int,
    T: int,
    copies: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Any:
    """The kernel for T queries and `copies` times T keys.

    All copies but the last are visible; the last is causal.  With a window, queries
    see what is within it in every copy.
    """
    module = _splash()
    block = next(n for n in BLOCKS if T % n == 0)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
    names += "block_kv_dkv_compute block_q_dq block_kv_dq"
    shape = (T, copies * T)
    mask: Any = module.CausalMask(shape, offset=(copies - 1) * T)
    if window is not None:
        # One band in each copy.  A band also reaches into the copy before, but only to
        # slots after the query's, whose keys are never in the query's segment.
        bands = (
            module.LocalMask(shape, window_size=(window - 1, 0), offset=c * T)
            for c in range(copies)
        )
        mask = functools.reduce(operator.or_, bands)
    return module.make_splash_mha(
        module.MultiHeadMask([mask] * H),
        block_sizes=module.BlockSizes(**dict.fromkeys(names.split(), block)),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )


def _skip_blocks(kernel: Any, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Any:
    """The kernel, restricted to blocks where some query attends to some key.

    Args:
        kernel: from `_make_splash`, which skips only blocks that its mask excludes.
        queries: the segment of each query.
        keys: the segment of each key.
    """
    block = kernel.kwargs["block_sizes"].block_q
    N, M = len(queries) // block, len(keys) // block
    same = queries[:, None] == keys
    some = jnp.any(same.reshape(N, block, M, block), axis=(1, 3))

    def table(info, axis):
        # The steps along this axis may leave out blocks that the mask excludes:
        # `data_next` has the block of each step.
        place = info.data_next[0].astype(jnp.int32)
        needed = jnp.take_along_axis(some, place, axis)
        work = jnp.where(needed, info.block_mask[0], 0)
        # A skipped block fetches what the next one needs, or nothing after the last.
        last = jnp.max(jnp.where(work > 0, place, 0), axis=axis, keepdims=True)
        following = jnp.where(work > 0, place, last)
        following = jax.lax.cummin(following, axis=axis, reverse=True)
        return info._replace(
            block_mask=work[None].astype(info.block_mask.dtype),
            data_next=following[None].astype(info.data_next.dtype),
        )

    return type(kernel)(
        table(kernel.fwd_mask_info, 1),
        table(kernel.dq_mask_info, 1),
        table(kernel.dkv_mask_info, 0),
        **kernel.kwargs,
    )


# ---- GPU ---------------------------------------------------------------------------


def _cudnn_takes(q: Queries, soft_cap: float | None = None) -> bool:
    """Whether cuDNN is available and supports queries of this dtype and shape.

    It has no soft cap.
    """
    device: Any = jax.local_devices()[0]
    T, K = q.shape[1], q.shape[-1]
    return (
        soft_cap is None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and T % 2 == 0
        and K % 8 == 0
        and K <= 128
        and "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8
    )


def cudnn(q: Queries, k: Keys, v: Keys, *, window: int | None = None) -> Queries:
    """Causal attention of whole rows."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def cudnn_packed(
    q: Queries,
    k: Keys,
    v: Keys,
    prompt_ids: PerToken,
    parts: PerToken,
    positions: PerToken | None = None,
    reach: Int[Array, ""] | None = None,
    *,
    completions: int = 2,
) -> Queries:
    """Attention of packed rows, see `attention.packed_attention`."""
    mask = visible(prompt_ids, parts, positions, reach)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation="cudnn"
    )


def dense_packed(
    q: Queries,
    k: Keys,
    v: Keys,
    prompt_ids: PerToken,
    parts: PerToken,
    positions: PerToken | None = None,
    reach: Int[Array, ""] | None = None,
    *,
    completions: int = 2,
    soft_cap: float | None = None,
) -> Queries:
    """The same without a kernel, with all scores in memory."""
    mask = visible(prompt_ids, parts, positions, reach)
    mask &= jnp.tri(q.shape[1], dtype=bool)
    return attention(q, k, v, mask, soft_cap=soft_cap)


def visible(
    prompt_ids: PerToken,
    parts: PerToken,
    positions: PerToken | None = None,
    reach: Int[Array, ""] | None = None,
) -> Bool[Array, "B 1 T T"]:
    """Which keys each query of packed rows may attend to, ignoring their order."""
    query, key = (lambda x: x[:, None, :, None]), (lambda x: x[:, None, None])
    same_part = (query(parts) == key(parts)) | (key(parts) == 0)
    seen = (query(prompt_ids) == key(prompt_ids)) & same_part
    if positions is None:
        return seen
    return seen & (query(positions) - key(positions) < reach)
