"""Weights gathered over the mesh: their gradients, and what the devices send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpref.models import gathering
from jaxpref.models.gathering import (
    all_gather_per_row_group,
    embedding_lookup,
    linear_vjp,
    transpose_table,
)
from jaxpref.models.logprobs import project, token_logps
from jaxpref.plan import hlo
from tests.test_models import replace

V, D, B, T = 48, 16, 8, 5
MESHES = [(1, 8, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1), (1, 1, 1)]


def mesh(sizes):
    names, types = ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.set_mesh(jax.make_mesh(sizes, names, axis_types=types, devices=devices))


def draw():
    rng = np.random.default_rng(0)
    embed = rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V // 2, (B, T))  # many of them twice
    return embed, tokens


def tied(embed, tokens):
    """Something of a tied embedding and head."""
    table = all_gather_per_row_group(embed, "float32")
    x = embedding_lookup(table, tokens, jnp.float32)
    z = project(jnp.sin(x), transpose_table(table, "float32"))
    return jnp.sum(jnp.cos(z))


def plainly(embed, tokens):
    return jnp.sum(jnp.cos(jnp.sin(embed[tokens]) @ embed.T))


@pytest.fixture(autouse=True)
def as_on_tpu(monkeypatch):
    """Elsewhere the compiler is left to place the collectives."""
    monkeypatch.setattr(gathering, "platform", lambda: "tpu")


@pytest.mark.parametrize("sizes", [None, *MESHES])
def test_value_and_gradient_are_those_of_the_plain_weight(sizes):
    embed, tokens = draw()
    with jax.enable_x64(True):
        wide = jnp.asarray(embed, jnp.float64)
        value, gradient = jax.value_and_grad(plainly)(wide, tokens)
    if sizes is None:
        found = jax.jit(jax.value_and_grad(tied))(jnp.asarray(embed), tokens)
    else:
        with mesh(sizes):
            placed = jax.reshard(jnp.asarray(embed), jax.P("fsdp", "tensor"))
            found = jax.jit(jax.value_and_grad(tied))(placed, tokens)
            assert jax.typeof(found[1]) == jax.typeof(placed)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [None, (1, 8, 1)])
def test_gradients_are_added_up_in_the_dtype_of_the_weight(sizes):
    """256 and then 255 ones are 511 in float32, and 256 in bfloat16."""
    tokens = np.zeros((8, 64), int)
    cotangents = np.ones((8, 64, D))
    cotangents[0, 0] = 256.0

    def summed(embed):
        x = embedding_lookup(
            all_gather_per_row_group(embed, "bfloat16"), tokens, jnp.bfloat16
        )
        assert x.dtype == jnp.bfloat16
        return jnp.sum(x.astype(jnp.float32) * cotangents)

    embed = jnp.ones((V, D))
    if sizes is None:
        found = jax.jit(jax.grad(summed))(embed)
    else:
        with mesh(sizes):
            placed = jax.reshard(embed, jax.P("fsdp", "tensor"))
            found = jax.jit(jax.grad(summed))(placed)
    assert found.dtype == jnp.float32
    found = np.asarray(found)
    np.testing.assert_array_equal(found[0], 8 * 64 - 1 + 256.0)
    np.testing.assert_array_equal(found[1:], 0)


def test_what_is_moved_is_rounded_and_its_gradient_is_not():
    x = jnp.asarray([1 / 3, 2.0, 1e-9])
    value, gradient = jax.value_and_grad(
        lambda x: jnp.vdot(linear_vjp(jnp.flip, jnp.flip, x, "bfloat16"), x)
    )(x)
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(value, rounded[::-1] @ np.asarray(x), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, rounded[::-1] + np.asarray(x)[::-1], rtol=1e-6, atol=0
    )
    # Float32 is not widened on its way.
    same = lambda x: linear_vjp(jnp.flip, jnp.flip, x, "float64")
    assert "f64" not in str(jax.make_jaxpr(same)(x))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2)])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_devices_send_no_more_than_fsdp_needs(is_tied, sizes):
    """Weights twice, gradients once, for all chunks of log-probs together."""
    model = replace(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=64,
        num_layers=3,
        tie_word_embeddings=is_tied,
        remat="full",
    )
    _, tokens = draw()

    def loss(params):
        at = jnp.broadcast_to(jnp.arange(T - 1), (B, T - 1))
        hidden, head, _ = model.hidden_and_heads(params, tokens)
        logps = token_logps(hidden, head, at, tokens[:, 1:], chunk_size=2)
        return jnp.sum(logps)

    with mesh(sizes):
        params = jax.jit(model.init)(jax.random.key(0))
        text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    found = hlo.collectives(text, devices=8)
    data, fsdp, tensor = sizes
    weights = {k: x.size for k, x in jax.tree_util.tree_leaves_with_path(params)}
    matrices = sum(
        size for path, size in weights.items() if "norm" not in str(path[-1])
    )
    part = (fsdp - 1) / fsdp * 4 * matrices / tensor
    assert found["reduce-scatter"]["wire_bytes"] == pytest.approx(part)
    # Embedding and head are gathered once.
    assert found["all-gather"]["wire_bytes"] <= 2 * part
    if tensor == data == 1:
        # Norms' gains, and sums of nothing but log-probs.
        norms = sum(weights.values()) - matrices
        assert found["all-reduce"]["wire_bytes"] < 2 * 4 * norms + 64


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 4, 1)])
def test_a_derivative_along_a_direction_is_that_of_one_device(sizes):
    """The gradient of the gradient, as `bvpo` takes it, through every gather."""
    model = replace(vocab_size=V, hidden_size=D, num_layers=1)
    _, tokens = draw()

    def along(params, directions):
        def losses(params):
            at = jnp.broadcast_to(jnp.arange(T - 1), (B, T - 1))
            hidden, head, _ = model.hidden_and_heads(params, tokens)
            return token_logps(hidden, head, at, tokens[:, 1:], chunk_size=2)

        values, pull = jax.vjp(losses, params)
        _, push = jax.vjp(lambda u: pull(u)[0], jnp.zeros_like(values))
        return push(directions)[0]

    init = jax.jit(model.init)
    params, directions = init(jax.random.key(0)), init(jax.random.key(1))
    expected = jax.jit(along)(params, directions)
    with mesh(sizes):
        params, directions = init(jax.random.key(0)), init(jax.random.key(1))
        found = jax.jit(along)(params, directions)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
