"""Attention by the kernels that jax ships for accelerators, and the choice of one.

TPU: splash attention.  A token sees keys of its own segment only, and a prompt would
have to be in the segments of both answers; so the keys are given twice, and the second
time prompts are in the segments of the rejected answers.  Blocks without a key that is
seen are neither fetched nor multiplied.
GPU: cuDNN's flash attention.  Packed rows need a mask there, whose memory grows with
the square of the row, and only what lies after a query is left out; jax 0.10 even
computes slopes in the mask, which 0.12 does not.  (jax's Pallas kernel for GPUs takes
segments, but only as many keys as queries, and no shared key heads.)

Axes: B rows, T tokens, H query heads, G key-value heads, K head features, N blocks of
queries and M of keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpref.models.config import platform

LANES = 128
"""Splash takes rows of a multiple of this, the width of a vector register."""
BLOCKS = (512, 256, 128)
"""Tokens of a block on TPU: the first that divides the row, as a step of the grid has a
fixed cost.  Not measured: no TPU was at hand."""


def causal_kernel(q) -> Callable | None:
    """The kernel `(q, k, v)` for whole rows, or None where XLA's attention serves."""
    where = platform()
    if where == "tpu" and _splash_takes(q):
        return splash
    return cudnn if where == "gpu" and _cudnn_takes(q) else None


def packed_kernel(q) -> Callable | None:
    """The kernel `(q, k, v, pairs, parts)` for packed rows, or None for blockwise."""
    where = platform()
    if where == "tpu" and _splash_takes(q):
        return splash_packed
    if where == "gpu" and q.dtype != jnp.float64:
        return cudnn_packed if _cudnn_takes(q) else dense_packed
    return None


# ---- TPU ---------------------------------------------------------------------------


def _splash_takes(q) -> bool:
    return q.dtype in (jnp.bfloat16, jnp.float32)


def splash(q, k, v, *, interpret=False):
    """Causal attention [B, T, H, K] of whole rows; shapes as `attention`'s."""
    T, H = q.shape[1:3]
    q, k, v = _by_head(_scaled(q)), _by_head(k), _by_head(v)
    kernel = _make_splash(H, q.shape[2], copies=1, interpret=interpret)
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :T]


def splash_packed(q, k, v, pairs, parts, *, interpret=False):
    """Attention [B, T, H, K] of packed rows, as `packed_attention`'s.

    `parts` are 0, 1 and 2: prompts, and at most two answers of a pair.
    """
    T, H = q.shape[1:3]
    q, k, v = _by_head(_scaled(q)), _by_head(k), _by_head(v)
    pad = ((0, 0), (0, q.shape[2] - T))
    pairs = jnp.pad(pairs, pad, constant_values=-1)
    parts = jnp.pad(parts, pad)
    # Padding sees itself; nobody sees the copies of anything but prompts.
    padding, nobody = -1 - jnp.arange(q.shape[2]), -1 - q.shape[2]
    own = jnp.where(pairs < 0, padding, 2 * pairs + (parts == 2))
    copies = jnp.where((pairs >= 0) & (parts == 0), 2 * pairs + 1, nobody)
    kernel = _make_splash(H, q.shape[2], copies=2, interpret=interpret)

    def row(q, k, v, own, copies):
        # The copies come first, so that all of them lie before every query.
        twice = lambda x: jnp.concatenate([x, x], axis=1)
        keys = jnp.concatenate([copies, own])
        ids = _splash().SegmentIds(own, keys)
        return _skip_blocks(kernel, own, keys)(q, twice(k), twice(v), ids)

    out = jax.lax.map(lambda x: row(*x), (q, k, v, own, copies))
    return out.swapaxes(1, 2)[:, :T]


def _splash():
    # Slow to import, and of use on TPU only.
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _scaled(q):
    """Queries over sqrt(K), which the kernel leaves to its caller."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _by_head(x):
    """[B, T, H, K] to [B, H, T, K], the row padded to whole registers."""
    padding = -x.shape[1] % LANES
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)


def _make_splash(H, T, *, copies, interpret):
    """The kernel of T queries to `copies` times T keys, causal in the last T."""
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


def _skip_blocks(kernel, queries, keys):
    """The kernel, at work only in blocks where a query sees a key.

    Args:
        kernel: of `_make_splash`, which skips only what lies after the queries.
        queries: int [T], segments.
        keys: int [2 T], segments.
    """
    info = kernel.fwd_mask_info
    N, M = info.block_mask.shape[1:]
    same = queries[:, None] == keys
    some = jnp.any(same.reshape(N, len(queries) // N, M, len(keys) // M), axis=(1, 3))
    work = jnp.where(some, info.block_mask[0], 0)

    def table(info, axis):
        # In an idle block the next one at work is fetched, or nothing after the last.
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


def _cudnn_takes(q) -> bool:
    """Whether cuDNN is here, and takes queries of this dtype and shape."""
    device = jax.local_devices()[0]
    T, K = q.shape[1], q.shape[-1]
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and T % 2 == 0
        and K % 8 == 0
        and K <= 128
        and "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8
    )


def cudnn(q, k, v):
    """Causal attention [B, T, H, K] of whole rows; shapes as `attention`'s."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def cudnn_packed(q, k, v, pairs, parts):
    """Attention [B, T, H, K] of packed rows, as `packed_attention`'s."""
    mask = _same_text(pairs, parts)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation="cudnn"
    )


def dense_packed(q, k, v, pairs, parts):
    """The same where cuDNN cannot, with all scores in memory."""
    mask = _same_text(pairs, parts)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def _same_text(pairs, parts):
    """What each query sees, and what follows it: bool [B, 1, T, T]."""
    query, key = (lambda x: x[:, None, :, None]), (lambda x: x[:, None, None])
    before = key(parts) == 0
    return (query(pairs) == key(pairs)) & ((query(parts) == key(parts)) | before)
