"""Blockwise attention with a hand-written backward pass, for CPU.

Compute and memory grow with the number of blocks in which tokens attend to each other,
not with the square of the row length.  The backward pass recomputes the scores.

Axes: B rows, T tokens, H query heads, G key-value heads, K head features; N blocks of a
row, M = H / G * block queries of a block that share a key head.

Source of the blockwise softmax: Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.models.dense_attention import NEVER, cap_scores

BLOCK = 64
"""Tokens per block."""


def blockwise_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    prompt_ids: Int[Array, "B T"],
    parts: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    reach: Int[Array, ""] | None = None,
    *,
    soft_cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Attention of packed rows, see `attention.packed_attention`.

    Each query block visits the key blocks with the prompts and the own parts of its
    tokens, as far as they are within `reach`, a difference of positions.  It cannot be
    differentiated twice.
    """
    T = q.shape[1]
    padding = -T % BLOCK
    if padding:
        pad = lambda x, value=0: jnp.pad(
            x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=value
        )
        q, k, v, parts = pad(q), pad(k), pad(v), pad(parts)
        prompt_ids = pad(prompt_ids, -1)
        positions = None if positions is None else pad(positions)
    tokens = Tokens(prompt_ids, parts, positions, reach)
    out: Any = _blockwise(soft_cap, q, k, v, tokens)
    return out[:, :T]


class Tokens(NamedTuple):
    """What determines who attends to whom; [B, T], or [N, block] of one row."""

    prompt_ids: Int[Array, "B T"]
    parts: Int[Array, "B T"]
    positions: Int[Array, "B T"] | None
    reach: Int[Array, ""] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(soft_cap, q, k, v, tokens):
    return _forward(soft_cap, q, k, v, tokens)[0]


def _forward(soft_cap, q, k, v, tokens):
    rows = (_queries(q, k.shape[2]), _keys(k), _keys(v), *_by_block(tokens))
    forward = functools.partial(_forward_row, soft_cap, tokens.reach)
    out, lse = jax.lax.map(lambda row: forward(*row), rows)
    return _tokens(out), (q, k, v, tokens, out, lse)


def _backward(soft_cap, saved, cotangents):
    q, k, v, tokens, out, lse = saved
    G = k.shape[2]
    # The gradient of each query's normalizer: the mean gradient of its weights.
    cotangents = _queries(cotangents, G)
    wide = jnp.promote_types(out.dtype, jnp.float32)
    means = jnp.sum(cotangents.astype(wide) * out.astype(wide), axis=-1)
    rows = (_queries(q, G), _keys(k), _keys(v), *_by_block(tokens))
    backward = functools.partial(_backward_row, soft_cap, tokens.reach)
    dq, dk, dv = jax.lax.map(
        lambda row: backward(*row), (*rows, cotangents, means, lse)
    )
    return _tokens(dq), _tokens(dk), _tokens(dv), None


_blockwise.defvjp(_forward, _backward)


def _forward_row(soft_cap, reach, q, k, v, tokens, visits):
    """Outputs [N, G, M, K] and the log of each query's normalizer [N, G, M]."""
    scale, wide = q.shape[-1] ** -0.5, jnp.promote_types(q.dtype, jnp.float32)

    def queries(i, carry):
        out, lse = carry

        def keys(n, carry):
            top, total, summed = carry
            j = _visited(visits[i], n)
            scores = _einsum("gmk,gsk->gms", q[i], k[j]) * scale
            seen = _visible(tokens, reach, i, j, q)
            scores = jnp.where(seen, cap_scores(scores, soft_cap), NEVER)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1)
            more = _einsum("gms,gsk->gmk", weights.astype(v.dtype), v[j])
            return higher, total, summed * shrink[..., None] + more

        G, M, K = q.shape[1:]
        lowest = jnp.full((G, M), NEVER, wide)
        start = lowest, jnp.zeros((G, M), wide), jnp.zeros((G, M, K), wide)
        top, total, summed = jax.lax.fori_loop(0, visits[i, 3], keys, start)
        mean = (summed / total[..., None]).astype(q.dtype)
        return out.at[i].set(mean), lse.at[i].set(top + jnp.log(total))

    empty = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], wide)
    return jax.lax.fori_loop(0, len(q), queries, empty)


def _backward_row(soft_cap, reach, q, k, v, tokens, visits, cotangents, means, lse):
    """Gradients of queries [N, G, M, K], and of keys and values [N, G, block, K].

    Gradients of keys and values are accumulated as [N, G, K, block].  Otherwise XLA
    would have to transpose the weights [G, M, block] in each product, which is slow.
    """
    scale, wide = q.shape[-1] ** -0.5, lse.dtype
    qT, cotangentsT = q.swapaxes(-1, -2), cotangents.swapaxes(-1, -2)

    def queries(i, carry):
        def keys(n, carry):
            dq, dk, dv = carry
            j = _visited(visits[i], n)
            scores = _einsum("gmk,gsk->gms", q[i], k[j]) * scale
            scores = cap_scores(scores, soft_cap)
            seen = _visible(tokens, reach, i, j, q)
            weights = jnp.where(seen, jnp.exp(scores - lse[i][..., None]), 0)
            dweights = _einsum("gmk,gsk->gms", cotangents[i], v[j])
            dscores = weights * (dweights - means[i][..., None])
            if soft_cap is not None:
                dscores = dscores * (1 - (scores / soft_cap) ** 2)
            dscores = dscores.astype(q.dtype)
            weights = weights.astype(q.dtype)
            dv = dv.at[j].add(_einsum("gkm,gms->gks", cotangentsT[i], weights))
            dk = dk.at[j].add(_einsum("gkm,gms->gks", qT[i], dscores))
            return dq + _einsum("gms,gsk->gmk", dscores, k[j]), dk, dv

        dq, dk, dv = carry
        start = jnp.zeros(q.shape[1:], wide), dk, dv
        dqi, dk, dv = jax.lax.fori_loop(0, visits[i, 3], keys, start)
        return dq.at[i].set((dqi * scale).astype(q.dtype)), dk, dv

    zeros = jnp.zeros(k.swapaxes(-1, -2).shape, wide)
    dq, dk, dv = jax.lax.fori_loop(
        0, len(q), queries, (jnp.zeros_like(q), zeros, zeros)
    )
    dk, dv = (dk * scale).swapaxes(-1, -2), dv.swapaxes(-1, -2)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _einsum(equation, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _visible(tokens, reach, i, j, q):
    """Which keys of block j the queries of block i attend to, bool [M, block]."""
    query, key = (lambda x: x[i][:, None]), (lambda x: x[j][None])
    ids, parts, positions = tokens
    slots = jnp.arange(BLOCK)
    same_part = (query(parts) == key(parts)) | (key(parts) == 0)
    seen = (query(ids) == key(ids)) & same_part
    seen &= (i * BLOCK + slots)[:, None] >= (j * BLOCK + slots)[None]
    if reach is not None:
        seen &= query(positions) - key(positions) < reach
    return jnp.tile(seen, (q.shape[2] // BLOCK, 1))


def _visited(visits, n):
    """The n-th key block that a query block visits."""
    first, before, own, _ = visits
    return jnp.where(n < before, first + n, own + n - before)


def _by_block(tokens):
    """Prompts, parts and positions [B, N, block], and what blocks visit [B, N, 4].

    A query block visits two runs of key blocks: `before` blocks starting at `first`,
    with the prompts, and the blocks from `own` up to itself, with the queries' own
    parts.  The fourth number is the total count.  Between the two runs are completions
    to which no query in the block attends.  Padding visits its own block only and
    attends at least to itself.
    """
    prompt_ids, parts, positions, reach = tokens
    slots = jnp.arange(prompt_ids.shape[1])
    real = prompt_ids >= 0

    def begins(x):
        change = x[:, 1:] != x[:, :-1]
        return jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)

    by_block = lambda x: x.reshape(len(x), -1, BLOCK)
    new_prompt = begins(prompt_ids)
    begin = jax.lax.cummax(jnp.where(new_prompt, slots, 0), axis=1)
    own = jax.lax.cummax(jnp.where(new_prompt | begins(parts), slots, 0), axis=1)
    # The last token of the prompt, for its completions.
    prompt = real & (parts == 0)
    prompt_end = jax.lax.cummax(jnp.where(prompt, slots, 0), axis=1)
    if reach is not None:
        # Of the prompt, and of its own part, a token sees only what is within reach.
        begin = begin + jnp.maximum(positions - reach + 1, 0)
        own = jnp.maximum(own, slots - reach + 1)
    begin, own, prompt_end = (
        jnp.where(real, x, slots) for x in (begin, own, prompt_end)
    )
    own = jnp.min(by_block(own), axis=-1) // BLOCK
    first = jnp.minimum(jnp.min(by_block(begin), axis=-1) // BLOCK, own)
    prompt_end = jnp.max(by_block(prompt_end), axis=-1) // BLOCK
    before = jnp.clip(prompt_end + 1 - first, 0, own - first)
    count = before + jnp.arange(own.shape[1]) - own + 1
    visits = jnp.stack([first, before, own, count], -1)
    blocks = tuple(x if x is None else by_block(x) for x in tokens[:3])
    return blocks, visits


def _queries(q, G):
    """[B, T, H, K] to [B, N, G, M, K], with the queries of one key head adjacent."""
    B, T, H, K = q.shape
    q = q.reshape(B, T // BLOCK, BLOCK, G, H // G, K)
    return q.transpose(0, 1, 3, 4, 2, 5).reshape(B, T // BLOCK, G, -1, K)


def _keys(k):
    """[B, T, G, K] to [B, N, G, block, K]."""
    return _queries(k, k.shape[2])


def _tokens(x):
    """[B, N, G, M, K] back to [B, T, H, K], whatever M is."""
    B, N, G, M, K = x.shape
    x = x.reshape(B, N, G, M // BLOCK, BLOCK, K).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, N * BLOCK, -1, K)
