"""Attention: of whole sequences, and of packed rows without what a query cannot see.

Axes: B rows, T tokens, S key slots, H query heads, G key-value heads, K head features;
N blocks of a row, M = H / G * block queries of a block that share a key head.
"""

import jax
import jax.numpy as jnp

from jaxpref.models.attention_kernels import causal_kernel, packed_kernel
from jaxpref.models.config import SPECS, on_mesh

BLOCK = 64
"""Tokens of a block."""
NOTHING = -1e30
"""In place of minus infinity, whose differences are not numbers."""


def attention(q, k, v, mask, *, kernels: bool = True):
    """Grouped-query attention [B, T, H, K], scaled by 1/sqrt(K).

    Args:
        q: [B, T, H, K].
        k: [B, S, G, K]; query head h reads key head h // (H / G).
        v: [B, S, G, K].
        mask: bool [B, 1, T, S], or None for causal.
        kernels: those of accelerators may be taken, which have no second derivatives.
    """
    if kernels and mask is None and (kernel := causal_kernel(q)) is not None:
        return _on_each_device(kernel, q, k, v)
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)
    # That function's softmax is float32 for every input, and float64 is there to check
    # everything else to many digits.
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    grouped = jnp.reshape(q, (B, T, G, H // G, K), out_sharding=on_mesh(SPECS.groups))
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k) * K**-0.5
    seen = jnp.tri(T, S, dtype=bool) if mask is None else mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, NOTHING), axis=-1)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v)
    return jnp.reshape(out, (B, T, H, K), out_sharding=on_mesh(SPECS.heads))


def packed_attention(q, k, v, pairs, parts):
    """Attention of packed rows [B, T, H, K]: each token sees its own pair's past.

    That is the pair's prompt (part 0) and its own part, as far as they stand before it.
    Work and memory grow with the tokens that are seen, block by block, and not with the
    square of the row: a query block visits the key blocks of its pairs' prompts and of
    its own parts, and the backward pass computes the scores again.  On accelerators
    kernels of their own do the same, see `attention_kernels`.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K]; query head h reads key head h // (H / G).
        v: [B, T, G, K].
        pairs: int [B, T], the same for the tokens of a pair, which stand side by side;
            negative for padding, whose results mean nothing.
        parts: int [B, T], 0 for prompts, 1 and 2 for the answers of a pair.

    Source of the blockwise softmax: Dao et al. 2022, arXiv:2205.14135, algorithms 1, 4.
    """
    if (kernel := packed_kernel(q)) is not None:
        return _on_each_device(kernel, q, k, v, pairs, parts)
    T = q.shape[1]
    padding = -T % BLOCK
    if padding:
        pad = lambda x, value=0: jnp.pad(
            x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=value
        )
        q, k, v, pairs, parts = pad(q), pad(k), pad(v), pad(pairs, -1), pad(parts)
    return _on_each_device(_attend, q, k, v, pairs, parts)[:, :T]


def _on_each_device(kernel, *arrays):
    """Attention [B, T, H, K] of each device's own rows and heads."""
    if (heads := on_mesh(SPECS.heads)) is None:
        return kernel(*arrays)
    specs = tuple(heads if x.ndim == 4 else on_mesh(SPECS.tokens) for x in arrays)
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(*arrays)


@jax.custom_vjp
def _attend(q, k, v, pairs, parts):
    return _forward(q, k, v, pairs, parts)[0]


def _forward(q, k, v, pairs, parts):
    rows = (_queries(q, k.shape[2]), _keys(k), _keys(v), *_places(pairs, parts))
    out, lse = jax.lax.map(lambda row: _forward_row(*row), rows)
    return _tokens(out), (q, k, v, pairs, parts, out, lse)


def _backward(saved, slopes):
    q, k, v, pairs, parts, out, lse = saved
    G = k.shape[2]
    # The slope of each query's normaliser: the mean slope of its weights.
    slopes = _queries(slopes, G)
    wide = jnp.promote_types(out.dtype, jnp.float32)
    means = jnp.sum(slopes.astype(wide) * out.astype(wide), axis=-1)
    rows = (_queries(q, G), _keys(k), _keys(v), *_places(pairs, parts))
    dq, dk, dv = jax.lax.map(
        lambda row: _backward_row(*row), (*rows, slopes, means, lse)
    )
    return _tokens(dq), _tokens(dk), _tokens(dv), None, None


_attend.defvjp(_forward, _backward)


def _forward_row(q, k, v, pairs, parts, visits):
    """Outputs [N, G, M, K] and the log of each query's normaliser [N, G, M]."""
    scale, wide = q.shape[-1] ** -0.5, jnp.promote_types(q.dtype, jnp.float32)

    def queries(i, carry):
        out, lse = carry

        def keys(n, carry):
            top, total, mix = carry
            j = _visited(visits[i], n)
            scores = _products("gmk,gsk->gms", q[i], k[j]) * scale
            scores = jnp.where(_seen(pairs, parts, i, j, q), scores, NOTHING)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1)
            more = _products("gms,gsk->gmk", weights.astype(v.dtype), v[j])
            return higher, total, mix * shrink[..., None] + more

        G, M, K = q.shape[1:]
        nothing = jnp.full((G, M), NOTHING, wide)
        start = nothing, jnp.zeros((G, M), wide), jnp.zeros((G, M, K), wide)
        top, total, mix = jax.lax.fori_loop(0, visits[i, 3], keys, start)
        mix = (mix / total[..., None]).astype(q.dtype)
        return out.at[i].set(mix), lse.at[i].set(top + jnp.log(total))

    empty = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], wide)
    return jax.lax.fori_loop(0, len(q), queries, empty)


def _backward_row(q, k, v, pairs, parts, visits, slopes, means, lse):
    """Slopes in queries [N, G, M, K], and in keys and values [N, G, block, K]."""
    scale, wide = q.shape[-1] ** -0.5, lse.dtype

    def queries(i, carry):
        def keys(n, carry):
            dq, dk, dv = carry
            j = _visited(visits[i], n)
            scores = _products("gmk,gsk->gms", q[i], k[j]) * scale
            seen = _seen(pairs, parts, i, j, q)
            weights = jnp.where(seen, jnp.exp(scores - lse[i][..., None]), 0)
            dweights = _products("gmk,gsk->gms", slopes[i], v[j])
            dscores = (weights * (dweights - means[i][..., None])).astype(q.dtype)
            weights = weights.astype(q.dtype)
            dv = dv.at[j].add(_products("gms,gmk->gsk", weights, slopes[i]))
            dk = dk.at[j].add(_products("gms,gmk->gsk", dscores, q[i]) * scale)
            return dq + _products("gms,gsk->gmk", dscores, k[j]), dk, dv

        dq, dk, dv = carry
        start = jnp.zeros(q.shape[1:], wide), dk, dv
        dqi, dk, dv = jax.lax.fori_loop(0, visits[i, 3], keys, start)
        return dq.at[i].set((dqi * scale).astype(q.dtype)), dk, dv

    zeros = jnp.zeros(k.shape, wide)
    dq, dk, dv = jax.lax.fori_loop(
        0, len(q), queries, (jnp.zeros_like(q), zeros, zeros)
    )
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _products(equation, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _seen(pairs, parts, i, j, q):
    """Which keys of block j the queries of block i see, bool [M, block]."""
    query, key = (lambda x: x[i][:, None]), (lambda x: x[j][None])
    place = jnp.arange(BLOCK)
    before = key(parts) == 0
    seen = (query(pairs) == key(pairs)) & ((query(parts) == key(parts)) | before)
    seen &= (i * BLOCK + place)[:, None] >= (j * BLOCK + place)[None]
    return jnp.tile(seen, (q.shape[2] // BLOCK, 1))


def _visited(visits, n):
    """The n-th key block that a query block visits."""
    first, before, own, _ = visits
    return jnp.where(n < before, first + n, own + n - before)


def _places(pairs, parts):
    """Pairs and parts by block [B, N, block], and what each block visits [B, N, 4].

    Visits are two runs of key blocks, up to the query block itself: `before` blocks
    from `first` on hold the prompts, and those from `own` on the queries' own parts;
    fourth, how many they are.  Between them lie answers that nobody in the block sees.
    Padding visits its own block only, where it sees at least itself.
    """
    place = jnp.arange(pairs.shape[1])
    real = pairs >= 0

    def begins(x):
        change = x[:, 1:] != x[:, :-1]
        return jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)

    by_block = lambda x: x.reshape(len(x), -1, BLOCK)
    new_pair = begins(pairs)
    begin = jax.lax.cummax(jnp.where(new_pair, place, 0), axis=1)
    own = jax.lax.cummax(jnp.where(new_pair | begins(parts), place, 0), axis=1)
    # The last token of the prompt, for all tokens that come after it in the pair.
    prompt = real & (parts == 0)
    prompt_end = jax.lax.cummax(jnp.where(prompt, place, 0), axis=1)
    begin, own, prompt_end = (
        jnp.where(real, x, place) for x in (begin, own, prompt_end)
    )
    first = jnp.min(by_block(begin), axis=-1) // BLOCK
    own = jnp.min(by_block(own), axis=-1) // BLOCK
    prompt_end = jnp.max(by_block(prompt_end), axis=-1) // BLOCK
    before = jnp.clip(prompt_end + 1 - first, 0, own - first)
    count = before + jnp.arange(own.shape[1]) - own + 1
    return by_block(pairs), by_block(parts), jnp.stack([first, before, own, count], -1)


def _queries(q, G):
    """[B, T, H, K] to [B, N, G, M, K]: queries of one key head side by side."""
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
