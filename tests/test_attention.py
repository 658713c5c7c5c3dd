"""Attention of packed rows against the definition, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpref.models.attention import (
    Segments,
    attention,
    causal_attention,
    packed_attention,
)
from jaxpref.models.blockwise import BLOCK
from jaxpref.models.layout import SPECS, reshard

H, G, K = 4, 2, 8


def rows(T, seed=0, answers=2):
    """Pairs and parts of two rows: prompts, their answers, padding at the end."""
    rng = np.random.default_rng(seed)
    pairs, parts = np.full((2, T), -1), np.zeros((2, T), int)
    for row in range(2):
        at = pair = 0
        while True:
            sizes = rng.integers(1, max(2, T // 3 // answers), answers + 1)
            if at + sizes.sum() > T - row * 3:
                break
            for part, size in enumerate(sizes):
                pairs[row, at : at + size], parts[row, at : at + size] = pair, part
                at += size
            pair += 1
    return pairs, parts


def seen(pairs, parts):
    """Whether query t sees key s, one by one, bool [B, 1, T, T]."""
    B, T = pairs.shape
    mask = np.zeros((B, 1, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        same = pairs[b, t] == pairs[b, s] >= 0
        mask[b, 0, t, s] = same and s <= t and parts[b, s] in (0, parts[b, t])
    return mask


def arrays(T, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, T, heads, K)), dtype)
    return draw(H), draw(G), draw(G), draw(H)


def by_definition(q, k, v, mask):
    k, v = (np.repeat(np.asarray(x, float), H // G, axis=2) for x in (k, v))
    scores = np.einsum("bthk,bshk->bhts", np.asarray(q, float), k) / np.sqrt(K)
    weights = np.where(mask, np.exp(scores), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhts,bshk->bthk", weights, v)


@pytest.mark.parametrize("T", [5, BLOCK, 2 * BLOCK + 7, 4 * BLOCK])
def test_packed_attention_is_attention_to_what_is_seen(T):
    with jax.enable_x64(True):
        q, k, v, cotangents = arrays(T)
        pairs, parts = rows(T)
        found = jax.jit(packed_attention)(
            q, k, v, (jnp.array(pairs), jnp.array(parts), 2)
        )
    real = pairs >= 0
    expected = by_definition(q, k, v, seen(pairs, parts))
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-12, atol=1e-13)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("T", [BLOCK - 3, 3 * BLOCK])
def test_gradients_are_those_of_dense_attention(T):
    with jax.enable_x64(True):
        q, k, v, cotangents = arrays(T)
        pairs, parts = rows(T, seed=2)
        cotangents = cotangents * (pairs >= 0)[..., None, None]
        # Padding sees itself here, so that no row of the mask is empty.
        mask = jnp.asarray(seen(pairs, parts) | np.eye(T, dtype=bool))
        summed = lambda function: lambda *qkv: jnp.sum(function(*qkv) * cotangents)
        packed = summed(
            lambda *qkv: packed_attention(*qkv, Segments(jnp.array(pairs), parts))
        )
        dense = summed(lambda *qkv: attention(*qkv, mask))
        found = jax.jit(jax.grad(packed, (0, 1, 2)))(q, k, v)
        expected = jax.jit(jax.grad(dense, (0, 1, 2)))(q, k, v)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_any_number_of_answers_can_follow_a_prompt():
    T = 3 * BLOCK + 5
    pairs, parts = rows(T, answers=5)
    assert parts.max() == 5
    mask, real = seen(pairs, parts), pairs >= 0
    with jax.enable_x64(True):
        q, k, v, cotangents = arrays(T)
        cotangents = cotangents * real[..., None, None]
        segments = Segments(jnp.array(pairs), jnp.array(parts), 5)
        found = {}
        for twice in (False, True):
            attend = lambda *qkv, twice=twice: packed_attention(
                *qkv, segments, twice_differentiable=twice
            )
            total = lambda *qkv, attend=attend: jnp.sum(attend(*qkv) * cotangents)
            gradients = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
            found[twice] = jax.jit(attend)(q, k, v)[real], *gradients
    expected = by_definition(q, k, v, mask)[real]
    np.testing.assert_allclose(found[False][0], expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(*found.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_whole_rows_in_float32_are_those_of_dense_attention(with_lengths):
    """Forward and gradients to 1e-5 of numbers of about 1, some 80 roundings."""
    T = 4 * BLOCK + 9
    q, k, v, cotangents = arrays(T, np.float32)
    lengths = jnp.array([T, BLOCK + 3]) if with_lengths else None
    if with_lengths:
        cotangents = cotangents * (np.arange(T) < lengths[:, None])[..., None, None]

    def run(attend):
        total = lambda *qkv: jnp.sum(attend(*qkv) * cotangents)
        return jax.jit(attend)(q, k, v), *jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    found = run(lambda *qkv: causal_attention(*qkv, lengths))
    expected = run(lambda *qkv: attention(*qkv, None))
    out, wanted = found[0], expected[0]
    if with_lengths:
        out, wanted = out[1, : lengths[1]], wanted[1, : lengths[1]]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_whole_rows_never_hold_all_scores():
    T = 16 * BLOCK
    q, k, v, cotangents = arrays(T, np.float32)
    total = lambda *qkv: jnp.sum(causal_attention(*qkv) * cotangents)
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 0.2 * q.shape[0] * H * T * T * 4


def test_only_dense_attention_is_differentiated_twice():
    T = 2 * BLOCK
    q, k, v, cotangents = arrays(T, np.float32)
    segments = Segments(jnp.zeros((2, T), int), jnp.zeros((2, T), int))

    def second(attend):
        def squared(q):
            gradient = jax.grad(lambda q: jnp.sum(attend(q, k, v) * cotangents))(q)
            return jnp.sum(gradient**2)

        return jax.jit(jax.grad(squared))(q)

    twice = dict(twice_differentiable=True)
    whole = second(lambda *qkv: causal_attention(*qkv, **twice))
    packed = second(lambda *qkv: packed_attention(*qkv, segments, **twice))
    assert jnp.abs(whole).max() > 1e-3
    np.testing.assert_allclose(packed, whole, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        second(causal_attention)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2)])
def test_a_mesh_changes_nothing(sizes):
    T = BLOCK + 9
    q, k, v, cotangents = arrays(T, np.float32)
    pairs, parts = rows(T)
    cotangents = cotangents * (pairs >= 0)[..., None, None]

    def run(place):
        def summed(q, k, v):
            placed = (place(x, SPECS.heads) for x in (q, k, v))
            out = packed_attention(
                *placed, Segments(*(place(x, SPECS.tokens) for x in segments))
            )
            return jnp.sum(out * place(cotangents, SPECS.heads)), out

        segments = jnp.array(pairs), jnp.array(parts)
        return jax.device_get(
            jax.jit(jax.grad(summed, (0, 1, 2), has_aux=True))(q, k, v)
        )

    alone = run(lambda x, spec: x)
    count = int(np.prod(sizes))
    mesh = jax.make_mesh(
        sizes,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 3,
        devices=jax.devices()[:count],
    )
    with jax.set_mesh(mesh):
        spread = run(reshard)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        spread,
        alone,
    )


def test_bfloat16_rounds_the_factors_only():
    q, k, v, _ = arrays(2 * BLOCK, jnp.bfloat16)
    pairs, parts = rows(2 * BLOCK)
    found = packed_attention(q, k, v, Segments(jnp.array(pairs), jnp.array(parts)))
    assert found.dtype == jnp.bfloat16
    expected = by_definition(q, k, v, seen(pairs, parts))
    real = pairs >= 0
    # Weights and results are rounded to 8 bits each.
    np.testing.assert_allclose(
        np.asarray(found, float)[real], expected[real], rtol=0.02, atol=0.02
    )


def positions_of(pairs, parts):
    """Positions of tokens in their texts: a completion's go on from its prompt's."""
    out = np.zeros_like(parts)
    for b, t in np.ndindex(*parts.shape):
        same = (pairs[b] == pairs[b, t]) & (np.arange(len(parts[b])) < t)
        mine = same & (parts[b] == parts[b, t])
        prompt = (same & (parts[b] == 0)).sum() if parts[b, t] else 0
        out[b, t] = mine.sum() + prompt
    return out


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("window", [1, 10, BLOCK + 9])
def test_windows_and_soft_caps_in_packed_rows(window, soft_cap):
    """Over several blocks, forward and gradients, against a mask of what is seen."""
    T = 4 * BLOCK + 5
    pairs, parts = rows(T, seed=3)
    positions = positions_of(pairs, parts)
    near = positions[:, None, :, None] - positions[:, None, None] < window
    mask, real = seen(pairs, parts) & near, pairs >= 0
    segments = Segments(jnp.array(pairs), jnp.array(parts))
    where = jnp.asarray(mask | np.eye(T, dtype=bool))
    with jax.enable_x64(True):
        q, k, v, cotangents = arrays(T)
        cotangents = cotangents * real[..., None, None]

        def packed(sliding, *qkv):
            options = dict(window=window, soft_cap=soft_cap)
            return packed_attention(
                *qkv, segments, jnp.array(positions), sliding, **options
            )

        dense = lambda *qkv: attention(*qkv, where, soft_cap=soft_cap)
        found, expected = (
            jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sum(f(*x) * cotangents), n))
            for f, n in ((packed, (1, 2, 3)), (dense, (0, 1, 2)))
        )
        for a, b in zip(
            jax.tree.leaves(found(jnp.array(True), q, k, v)),
            jax.tree.leaves(expected(q, k, v)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        everywhere = jax.jit(packed)(jnp.array(False), q, k, v)
    if soft_cap is None:
        expected = by_definition(q, k, v, seen(pairs, parts))[real]
        np.testing.assert_allclose(everywhere[real], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("T", [BLOCK - 3, 3 * BLOCK + 1])
def test_windows_in_whole_rows(T):
    q, k, v, _ = arrays(T, np.float32)
    distances = np.arange(T)[:, None] - np.arange(T)
    mask = (distances >= 0) & (distances < 20)
    attend = lambda *qkv, **options: causal_attention(*qkv, window=20, **options)
    expected = by_definition(q, k, v, mask)
    for options in ({}, {"twice_differentiable": True}):
        found = attend(q, k, v, None, jnp.array(True), **options)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found = attend(q, k, v, None, jnp.array(False))
    expected = by_definition(q, k, v, distances >= 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
