"""Sketches and directions: mean, deviation, linearity, memory, and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpref.gradients.bvpo import direction, ingredients, sketch

RANDOM = np.random.default_rng(0)
SHAPES = {"w": (3, 8, 16), "long": (1500,), "one": ()}


def tree(scale=1.0):
    draw = lambda shape: np.float32(scale * RANDOM.normal(size=shape))
    return {name: draw(shape) for name, shape in SHAPES.items()}


def flat(values):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(values)])


@functools.partial(jax.jit, static_argnames=("size", "keys"))
def many(gradient, *, size, keys=2000):
    each = lambda key: sketch(gradient, key, size=size)
    return jax.lax.map(each, jax.random.split(jax.random.key(1), keys), batch_size=50)


def concentrated():
    """One row and one column, where separate row and column signs would fail."""
    values = np.zeros((8, 16), np.float32)
    values[2], values[:, 5] = 1, 1
    return {"w": values}


def rank_one():
    return {"w": np.ones((8, 16), np.float32)}


@pytest.mark.parametrize("make", [tree, concentrated, rank_one])
@pytest.mark.parametrize("size", [1, 33])
def test_squared_norm_has_the_stated_mean_and_deviation(make, size):
    gradient = make()
    g = flat(gradient).astype(np.float64)
    ratios = (np.asarray(many(gradient, size=size)) ** 2).sum(1) / (g @ g)
    spread = np.sqrt(2 / size * (1 - (g**4).sum() / (g @ g) ** 2))
    assert abs(ratios.mean() - 1) < 4 * spread / len(ratios) ** 0.5
    np.testing.assert_allclose(ratios.std(), spread, rtol=0.12)


def test_inner_products_are_preserved_and_linear():
    a, b = tree(), tree(2.0)
    size = 8
    left, right = many(a, size=size), many(b, size=size)
    products = np.sum(np.asarray(left) * np.asarray(right), axis=1)
    error = products.std() / len(products) ** 0.5
    assert abs(products.mean() - flat(a) @ flat(b)) < 4 * error
    both = many(jax.tree.map(lambda x, y: 3 * x - y, a, b), size=size)
    np.testing.assert_allclose(both, 3 * left - right, atol=1e-3)


def test_equal_keys_give_equal_directions():
    g = {"w": np.float32(RANDOM.normal(size=(8, 16)))}
    first, again = (sketch(g, jax.random.key(0), size=4) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, sketch(g, jax.random.key(1), size=4))
    stacked = jax.tree.map(lambda x: np.stack([x, 2 * x]), g)
    rows = jax.vmap(lambda g: sketch(g, jax.random.key(0), size=4))(stacked)
    np.testing.assert_allclose(rows, [first, 2 * first], rtol=1e-4, atol=1e-4)


def test_dtypes():
    half = {"w": jnp.ones((8, 16), jnp.bfloat16)}
    assert sketch(half, jax.random.key(0), size=2).dtype == jnp.float32
    signs = direction(jax.random.key(0), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(signs)} == {jnp.dtype("bfloat16")}
    with jax.enable_x64(True):
        assert sketch(jnp.ones(3), jax.random.key(0), size=2).dtype == jnp.float64


def test_the_matrix_of_all_directions_is_never_materialized():
    """The compiled temporaries are a few gradients, not `size` of them."""
    for shape in ((512, 512), (2**18,), (64, 64, 64)):
        gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
        lower = jax.jit(lambda g, key: sketch(g, key, size=64)).lower
        compiled = lower(gradient, jax.random.key(0)).compile()
        scratch = compiled.memory_analysis().temp_size_in_bytes
        assert scratch < 8 * 4 * 2**18


def test_directions_are_fair_signs():
    g = tree()
    each = lambda key: jax.tree.map(lambda v, x: jnp.vdot(v, x), direction(key, g), g)
    probes = jax.vmap(each)(jax.random.split(jax.random.key(2), 4000))
    total = sum(np.asarray(x, np.float64) for x in probes.values())
    square = flat(g) @ flat(g)
    assert abs((total**2).mean() / square - 1) < 4 * (2 / 4000) ** 0.5
    signs = flat(direction(jax.random.key(0), g))
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 0.1


def test_a_forward_probe_computes_all_inner_products():
    """jvp along a direction, against single gradients; and the resulting estimates."""
    x = jnp.asarray(RANDOM.normal(size=(12, 5)), jnp.float32)
    params = {"w": jnp.asarray(RANDOM.normal(size=(5, 4)), jnp.float32)}
    losses = lambda p: jnp.sum(jnp.tanh(x @ p["w"]) ** 2, axis=-1)
    gradients = jax.jacrev(losses)(params)
    split = np.arange(12) < 7

    def probe(key):
        v = direction(key, params)
        _, probes = jax.jvp(losses, (params,), (v,))
        return probes, ingredients(
            probes, probes, trace_where=split, empty_where=~split
        )

    v = direction(jax.random.key(0), params)
    probes, _ = probe(jax.random.key(0))
    one_by_one = np.einsum("nij,ij->n", gradients["w"], v["w"])
    np.testing.assert_allclose(probes, one_by_one, rtol=1e-4, atol=1e-5)
    exact = ingredients(gradients, gradients, trace_where=split, empty_where=~split)
    keys = jax.random.split(jax.random.key(3), 4000)
    found = jax.vmap(lambda key: probe(key)[1])(keys)
    for name, truth in vars(exact).items():
        values = np.asarray(getattr(found, name), np.float64)
        assert abs(values.mean() - truth) <= 4 * values.std() / 4000**0.5, name


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sharding_does_not_matter(stacked):
    """Leaves, and stacked draws, sharded over eight devices."""
    gradient = {
        "w": np.float32(RANDOM.normal(size=(8, 16, 24))),
        "b": np.float32(RANDOM.normal(size=3000)),
        "one": np.float32(2),
    }
    specs = {
        "w": PartitionSpec(None, "data", "fsdp"),
        "b": PartitionSpec(("data", "fsdp")),
        "one": PartitionSpec(),
    }
    if stacked:
        gradient = jax.tree.map(lambda x: np.stack([x, -x, x / 2, 3 * x]), gradient)
        specs = {"w": PartitionSpec("data", None, None, "fsdp")}
        specs |= {"b": PartitionSpec("data"), "one": PartitionSpec("data")}
    key = jax.random.key(0)
    one = functools.partial(sketch, size=16)
    function = one
    if stacked:
        function = lambda g, key: jax.vmap(lambda g: one(g, key))(g)
    eager, signs = function(gradient, key), direction(key, gradient)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(value, jax.NamedSharding(mesh, specs[name]))
            for name, value in gradient.items()
        }
        found = jax.jit(function)(placed, key)
        v = jax.jit(direction)(key, placed)
        for name, leaf in v.items():
            assert jax.typeof(leaf).sharding == jax.typeof(placed[name]).sharding
        v = jax.tree.map(np.asarray, v)
    np.testing.assert_allclose(found, eager, rtol=1e-4, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, v, signs)


def test_invalid_input_is_rejected():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="size >= 1, got 0"):
        sketch(jnp.ones(3), key, size=0)
    with pytest.raises(ValueError, match="at least one array"):
        sketch({}, key, size=2)
    with pytest.raises(TypeError, match="floating point"):
        sketch(jnp.ones(3, int), key, size=2)
    assert direction(key, {}) == {}
