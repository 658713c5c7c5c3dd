"""Kernels for accelerators: the same numbers when interpreted, and which is chosen."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxpref.models import attention, attention_kernels
from jaxpref.models.attention_kernels import (
    causal_kernel,
    cudnn,
    cudnn_packed,
    dense_packed,
    packed_kernel,
    splash,
    splash_packed,
)
from jaxpref.models.layout import SPECS, reshard
from tests.test_attention import arrays, by_definition, positions_of, rows, seen

AXES = ("data", "fsdp", "tensor")


def causal(q, k, v):
    """Causal attention by the definition."""
    return by_definition(q, k, v, np.tri(q.shape[1], dtype=bool))


@pytest.fixture(scope="module")
def packed():
    """Two rows of three blocks and some padding, and how attention should be there."""
    T = 300
    pairs, parts = rows(T)
    assert pairs.max() > 2
    q, k, v, cotangents = arrays(T, np.float32)
    cotangents = cotangents * (pairs >= 0)[..., None, None]
    mask = seen(pairs, parts)
    with jax.enable_x64(True):
        exact = tuple(x.astype(float) for x in (q, k, v))
        visible = jnp.asarray(mask | np.eye(T, dtype=bool))
        out = functools.partial(attention.attention, mask=visible)
        expected = gradients_of(out, cotangents.astype(float))(*exact)
    segments = jnp.array(pairs), jnp.array(parts)
    return (q, k, v), segments, cotangents, expected, by_definition(q, k, v, mask)


def gradients_of(function, cotangents):
    summed = lambda *qkv: jnp.sum(function(*qkv) * cotangents)
    return jax.jit(jax.grad(summed, (0, 1, 2)))


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def through_xla(monkeypatch):
    """Does what cuDNN is asked for without it; returns a list of what was asked."""
    asked, real = [], jax.nn.dot_product_attention

    def instead(*qkv, implementation=None, **rest):
        asked.append(implementation)
        return real(*qkv, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return asked


@pytest.mark.parametrize("name", ["splash", "cudnn", "dense"])
def test_packed_kernels_are_attention_to_what_is_seen(name, packed, monkeypatch):
    kernel = {
        "splash": functools.partial(splash_packed, interpret=True),
        "cudnn": cudnn_packed,
        "dense": dense_packed,
    }[name]
    asked = through_xla(monkeypatch)
    qkv, segments, cotangents, expected_gradients, expected = packed
    attend = lambda *qkv: kernel(*qkv, *segments)
    found = jax.jit(attend)(*qkv)
    real = np.asarray(segments[0]) >= 0
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert np.isfinite(found).all()
    close(gradients_of(attend, cotangents)(*qkv), expected_gradients)
    assert set(asked) == {"splash": set(), "cudnn": {"cudnn"}, "dense": {None}}[name]


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_causal_kernels_see_the_past(name, monkeypatch):
    asked = through_xla(monkeypatch)
    kernel = functools.partial(splash, interpret=True) if name == "splash" else cudnn
    q, k, v, cotangents = arrays(200, np.float32)
    close([jax.jit(kernel)(q, k, v)], [causal(q, k, v)])
    assert set(asked) == ({"cudnn"} if name == "cudnn" else set())
    dense = functools.partial(attention.attention, mask=None)
    close(
        gradients_of(kernel, cotangents)(q, k, v),
        gradients_of(dense, cotangents)(q, k, v),
    )


def test_splash_takes_a_copy_of_the_keys_for_each_completion():
    T = 150
    pairs, parts = rows(T, answers=3)
    q, k, v, _ = arrays(T, np.float32)
    attend = functools.partial(splash_packed, completions=3, interpret=True)
    found = jax.jit(attend)(q, k, v, jnp.array(pairs), jnp.array(parts))
    real, expected = pairs >= 0, by_definition(q, k, v, seen(pairs, parts))
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)
    # A third answer where two were announced is not taken for another one.
    attend = functools.partial(splash_packed, completions=2, interpret=True)
    found = jax.jit(attend)(q, k, v, jnp.array(pairs), jnp.array(parts))
    np.testing.assert_array_equal(np.isnan(found).all((2, 3)), parts == 3)


def test_splash_on_a_mesh_changes_nothing(packed, monkeypatch):
    kernel = functools.partial(splash_packed, interpret=True)
    monkeypatch.setattr(attention, "packed_kernel", lambda q, **options: kernel)
    # Every row twice: one for each of the four devices that share the rows.
    twice = lambda x: np.concatenate([x, x])
    qkv, segments, cotangents, expected, _ = jax.tree.map(twice, packed)
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Explicit,) * 3)

    def attend(*qkv):
        heads = (reshard(x, SPECS.heads) for x in qkv)
        tokens = (reshard(x, SPECS.tokens) for x in segments)
        return attention.packed_attention(*heads, attention.Segments(*tokens))

    with jax.set_mesh(mesh):
        cotangents = reshard(cotangents, SPECS.heads)
        close(gradients_of(attend, cotangents)(*qkv), expected)


def test_splash_works_only_where_something_is_seen():
    # Four texts of a block each: of 4 x 8 blocks 4 are work, and 1 more for the prompt
    # that the second answer sees.
    kernel = attention_kernels._make_splash(2, 512 * 4, copies=2, interpret=True)
    text = jnp.repeat(jnp.arange(4), 512)
    keys = jnp.concatenate([jnp.repeat(jnp.array([-1, -1, 3, -1]), 512), text])
    skipping = attention_kernels._skip_blocks(kernel, text, keys)
    work = np.zeros((4, 8), bool)
    work[3, 2] = True
    work[np.arange(4), np.arange(4, 8)] = True
    by_query, by_key = skipping.fwd_mask_info, skipping.dkv_mask_info
    for info in by_query, skipping.dq_mask_info, by_key:
        np.testing.assert_array_equal(info.block_mask[0] > 0, work)
    # What is fetched is at work now, or next, or was last.
    fetched = [[4] * 8, [5] * 8, [6] * 8, [2, 2, 2, 7, 7, 7, 7, 7]]
    np.testing.assert_array_equal(by_query.data_next[0], fetched)
    np.testing.assert_array_equal(by_key.data_next[0], [[0, 0, 3, 0, 0, 1, 2, 3]] * 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("K", [64, 128])
def test_splash_lowers_for_tpu_without_one(dtype, K):
    T = 200
    shaped = lambda *rest: jax.ShapeDtypeStruct((2, T, *rest), dtype)
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)

    def summed(*qkv):
        out = splash(*qkv[:3]) + splash_packed(*qkv)
        return jnp.sum(out.astype(jnp.float32))

    cotangents = jax.jit(jax.grad(summed, (0, 1, 2)))
    program = jax.export.export(cotangents, platforms=["tpu"])(
        shaped(4, K), shaped(2, K), shaped(2, K), ids, ids
    )
    # Forward, gradients of queries, gradients of keys and values; for both kernels.
    assert program.mlir_module().count("tpu_custom_call") == 6


def on(platform):
    """A mesh of devices that this machine does not have."""
    device = AbstractDevice(device_kind="some", num_cores=1, platform=platform)
    mesh = AbstractMesh((1, 1, 1), AXES, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def like(dtype, T=64, K=64):
    return jax.ShapeDtypeStruct((1, T, 1, K), dtype)


def test_the_kernel_is_that_of_the_meshs_devices(monkeypatch):
    assert causal_kernel(like(jnp.float32)) is packed_kernel(like(jnp.float32)) is None
    with on("tpu"):
        for dtype in (jnp.float32, jnp.bfloat16):
            assert causal_kernel(like(dtype)) is splash
            assert packed_kernel(like(dtype)) is splash_packed
        assert causal_kernel(like(jnp.float16)) is None
        assert packed_kernel(like(jnp.float16)) is None
    with on("gpu"):
        # No cuDNN here.
        assert causal_kernel(like(jnp.bfloat16)) is None
        assert packed_kernel(like(jnp.bfloat16)) is dense_packed


class Device:
    """A GPU as jax describes it."""

    def __init__(self, version, capability):
        self.client = type("Client", (), {"platform_version": version})
        self.compute_capability = capability


def test_cudnn_takes_what_it_can(monkeypatch):
    bf16 = like(jnp.bfloat16)
    for version, capability, takes in [
        ("PJRT C API\ncuda 13000", "9.0", True),
        ("PJRT C API\ncuda 13000", "12.0", True),
        ("PJRT C API\ncuda 12080", "7.5", False),
        ("PJRT C API\nrocm 70000", "gfx942", False),
    ]:
        device = Device(version, capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        with on("gpu"):
            assert (causal_kernel(bf16) is cudnn) == takes
            assert packed_kernel(bf16) is (cudnn_packed if takes else dense_packed)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("cuda", "8.0")])
    with on("gpu"):
        assert causal_kernel(like(jnp.float16)) is cudnn
        for q in (like(jnp.float32), like(jnp.bfloat16, K=60), like(jnp.bfloat16, T=3)):
            assert causal_kernel(q) is None and packed_kernel(q) is dense_packed
        assert packed_kernel(like(np.dtype("float64"))) is None


def test_windows_and_soft_caps_of_kernels(monkeypatch):
    T, asked = 300, through_xla(monkeypatch)
    q, k, v, _ = arrays(T, np.float32)
    distances = np.arange(T)[:, None] - np.arange(T)
    expected = by_definition(q, k, v, (distances >= 0) & (distances < 150))
    for kernel in (functools.partial(splash, interpret=True), cudnn):
        found = kernel(q, k, v, window=150)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert asked == ["cudnn"]
    capped = splash(q, k, v, soft_cap=0.7, interpret=True)
    dense = attention.attention(q, k, v, None, soft_cap=0.7)
    np.testing.assert_allclose(capped, dense, rtol=1e-5, atol=1e-5)


def test_packed_kernels_within_reach_and_with_soft_caps(packed):
    (q, k, v), (pairs, parts), _, _, _ = packed
    positions = jnp.asarray(positions_of(np.asarray(pairs), np.asarray(parts)))
    reach, real = jnp.int32(17), np.asarray(pairs) >= 0
    near = positions[:, None, :, None] - positions[:, None, None] < reach
    mask = seen(np.asarray(pairs), np.asarray(parts)) & np.asarray(near)
    expected = by_definition(q, k, v, mask)
    within = (pairs, parts, positions, reach)
    for kernel in (
        dense_packed,
        functools.partial(splash_packed, window=17, interpret=True),
    ):
        found = jax.jit(kernel)(q, k, v, *within)
        np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)
    options = dict(soft_cap=0.7)
    capped = splash_packed(q, k, v, pairs, parts, interpret=True, **options)
    dense = dense_packed(q, k, v, pairs, parts, **options)
    np.testing.assert_allclose(capped[real], dense[real], rtol=1e-5, atol=1e-5)


def test_layers_of_both_kinds_choose_between_two_kernels(monkeypatch):
    """With sliding and full layers in one scan, each gets its own kernel."""
    kernel = lambda q, k, v, window: q * (0 if window is None else window)
    monkeypatch.setattr(attention, "causal_kernel", lambda *options: kernel)
    q, k, v, _ = arrays(8, np.float32)
    attend = jax.jit(
        lambda sliding: attention.causal_attention(q, k, v, None, sliding, window=3)
    )
    np.testing.assert_array_equal(attend(True), 3 * q)
    np.testing.assert_array_equal(attend(False), 0 * q)


@pytest.mark.parametrize("window", [pytest.param(17, marks=pytest.mark.slow), 150])
def test_splash_with_windows_places_prompts_before_each_answer(window):
    """Forward and gradients, three answers, in layers with and without the window."""
    T = 500
    pairs, parts = rows(T, answers=3)
    positions = positions_of(pairs, parts)
    near = positions[:, None, :, None] - positions[:, None, None] < window
    real, (q, k, v, cotangents) = pairs >= 0, arrays(T, np.float32)
    cotangents = cotangents * real[..., None, None]
    arguments = jnp.array(pairs), jnp.array(parts), jnp.array(positions)

    def splashed(reach):
        return lambda *qkv: splash_packed(
            *qkv, *arguments, reach, completions=3, window=window, interpret=True
        )

    for reach, mask in ((window, near), (T, True)):
        mask = seen(pairs, parts) & mask
        attend = splashed(jnp.int32(reach))
        found, expected = jax.jit(attend)(q, k, v), by_definition(q, k, v, mask)
        np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)
        where = jnp.asarray(mask | np.eye(T, dtype=bool))
        dense = functools.partial(attention.attention, mask=where)
        close(
            gradients_of(attend, cotangents)(q, k, v),
            gradients_of(dense, cotangents)(q, k, v),
        )
