"""Attention kernels for accelerators, from jax, and the choice of one.

TPU: splash attention.  A token attends only to keys of its own segment, but a prompt
would have to be in the segments of all its completions.  So the keys are passed once
per completion: in copy c, prompts are in the segment of completion c.  Blocks of keys
to which no query attends are neither fetched nor multiplied.
GPU: cuDNN's flash attention.  Packed rows need a mask, whose memory grows with the
square of the row length, and only keys after a query are skipped.  jax 0.10 also
computes gradients of the mask; 0.12 does not.  (jax's Pallas kernel for GPUs supports
segments, but needs as many keys as queries, and no shared key heads.)
Splash attention has not been run on a TPU yet, only interpreted and compiled for one.
None of these kernels has second derivatives.

Axes: B rows, T tokens, H query heads, G key-value heads, K head features, C completions
of a prompt, N blocks of queries and M of keys.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models.layout import platform

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B T G K"]
PerToken = Int[Array, "B T"]

LANES = 128
"""The width of a vector register; splash attention needs rows of a multiple of it."""
BLOCKS = (512, 256, 128)
"""Tokens per block on TPU: the first that divides the row, since each step of the grid
has a fixed cost.  Not yet measured on a TPU."""


def causal_kernel(q: Queries) -> Callable | None:
    """The kernel `(q, k, v)` for whole rows, or None if the platform has none."""
    where = platform()
    if where == "tpu" and _splash_takes(q):
        return splash
    return cudnn if where == "gpu" and _cudnn_takes(q) else None


def packed_kernel(q: Queries) -> Callable | None:
    """The kernel for packed rows, called like `splash_packed`; None for blockwise."""
    where = platform()
    if where == "tpu" and _splash_takes(q):
        return splash_packed
    if where == "gpu" and q.dtype != jnp.float64:
        return cudnn_packed if _cudnn_takes(q) else dense_packed
    return None


# ---- TPU ---------------------------------------------------------------------------


def _splash_takes(q: Queries) -> bool:
    return q.dtype in (jnp.bfloat16, jnp.float32)


def splash(q: Queries, k: Keys, v: Keys, *, interpret: bool = False) -> Queries:
    """Causal attention of whole rows."""
    T, H = q.shape[1:3]
    q, k, v = _by_head(_scaled(q)), _by_head(k), _by_head(v)
    kernel = _make_splash(H, q.shape[2], copies=1, interpret=interpret)
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :T]


def splash_packed(
    q: Queries,
    k: Keys,
    v: Keys,
    prompt_ids: PerToken,
    parts: PerToken,
    *,
    completions: int = 2,
    interpret: bool = False,
) -> Queries:
    """Attention of packed rows, see `attention.packed_attention`.

    A token of a part beyond `completions` gets NaN, not the result of another part.
    """
    T, H = q.shape[1:3]
    beyond = parts > completions
    q, k, v = _by_head(_scaled(q)), _by_head(k), _by_head(v)
    pad = ((0, 0), (0, q.shape[2] - T))
    prompt_ids = jnp.pad(prompt_ids, pad, constant_values=-1)
    parts = jnp.pad(parts, pad)
    # Padding attends to itself; in the copies, queries attend only to prompts.
    padding, never = -1 - jnp.arange(q.shape[2]), -1 - q.shape[2]
    first = completions * prompt_ids
    own = jnp.where(prompt_ids < 0, padding, first + jnp.maximum(parts - 1, 0))
    is_prompt = (prompt_ids >= 0) & (parts == 0)
    copies = [jnp.where(is_prompt, first + c, never) for c in range(1, completions)]
    kernel = _make_splash(H, q.shape[2], copies=completions, interpret=interpret)

    def row(q, k, v, own, *copies):
        # The copies come first, so that all of them lie before every query.
        repeated = lambda x: jnp.concatenate([x] * completions, axis=1)
        keys = jnp.concatenate([*copies, own])
        ids = _splash().SegmentIds(own, keys)
        return _skip_blocks(kernel, own, keys)(q, repeated(k), repeated(v), ids)

    out = jax.lax.map(lambda x: row(*x), (q, k, v, own, *copies))
    out = out.swapaxes(1, 2)[:, :T]
    return jnp.where(beyond[..., None, None], jnp.nan, out)


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


def _make_splash(H: int, T: int, *, copies: int, interpret: bool) -> Any:
    """The kernel for T queries and `copies` times T keys, causal in the last T."""
    module = _splash()
    block = next(n for n in BLOCKS if T % n == 0)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
    names += "block_kv_dkv_compute block_q_dq block_kv_dq"
    mask = module.CausalMask((T, copies * T), offset=(copies - 1) * T)
    return module.make_splash_mha(
        module.MultiHeadMask([mask] * H),
        block_sizes=module.BlockSizes(**dict.fromkeys(names.split(), block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _skip_blocks(kernel: Any, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Any:
    """The kernel, restricted to blocks where some query attends to some key.

    Args:
        kernel: from `_make_splash`, which skips only keys after the queries.
        queries: the segment of each query.
        keys: the segment of each key.
    """
    info = kernel.fwd_mask_info
    N, M = info.block_mask.shape[1:]
    same = queries[:, None] == keys
    some = jnp.any(same.reshape(N, len(queries) // N, M, len(keys) // M), axis=(1, 3))
    work = jnp.where(some, info.block_mask[0], 0)

    def table(info, axis):
        # A skipped block fetches what the next one needs, or nothing after the last.
        place = jax.lax.broadcasted_iota(jnp.int32, work.shape, axis)
        last = jnp.max(jnp.where(work > 0, place, 0), axis=axis, keepdims=True)
        following = jnp.where(work > 0, place, last)
        following = jax.lax.cummin(following, axis=axis, reverse=True)
        return info._replace(
            block_mask=work[None].astype(info.block_mask.dtype),
            data_next=following[None].astype(info.data_next.dtype),
        )

    return type(kernel)(
        table(info, 1),
        table(kernel.dq_mask_info, 1),
        table(kernel.dkv_mask_info, 0),
        **kernel.kwargs,
    )


# ---- GPU ---------------------------------------------------------------------------


def _cudnn_takes(q: Queries) -> bool:
    """Whether cuDNN is available and supports queries of this dtype and shape."""
    device: Any = jax.local_devices()[0]
    T, K = q.shape[1], q.shape[-1]
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and T % 2 == 0
        and K % 8 == 0
        and K <= 128
        and "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8
    )


def cudnn(q: Queries, k: Keys, v: Keys) -> Queries:
    """Causal attention of whole rows."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def cudnn_packed(
    q: Queries,
    k: Keys,
    v: Keys,
    prompt_ids: PerToken,
    parts: PerToken,
    *,
    completions: int = 2,
) -> Queries:
    """Attention of packed rows, see `attention.packed_attention`."""
    mask = visible(prompt_ids, parts)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation="cudnn"
    )


def dense_packed(
    q: Queries,
    k: Keys,
    v: Keys,
    prompt_ids: PerToken,
    parts: PerToken,
    *,
    completions: int = 2,
) -> Queries:
    """The same without cuDNN, with all scores in memory."""
    mask = visible(prompt_ids, parts)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def visible(prompt_ids: PerToken, parts: PerToken) -> Bool[Array, "B 1 T T"]:
    """Which keys each query of packed rows may attend to, ignoring their order."""
    query, key = (lambda x: x[:, None, :, None]), (lambda x: x[:, None, None])
    same_part = (query(parts) == key(parts)) | (key(parts) == 0)
    return (query(prompt_ids) == key(prompt_ids)) & same_part
