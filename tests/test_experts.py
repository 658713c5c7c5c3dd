"""Mixtures of experts against every expert applied to every token."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from jaxpref.errors import InputError
from jaxpref.models.experts import mixture
from jaxpref.models.families import mixtral
from jaxpref.models.grouped import by_group_on_tpu, by_row_on_tpu, grouped_product
from jaxpref.models.layout import SPECS
from jaxpref.models.lora import LoraOptions, lora_of
from jaxpref.plan import hlo
from jaxpref.sharding import on_axes
from tests.test_models import mesh
from tests.virtual import xla_flags_of_tpus

B, T, D, F, E, K = 4, 6, 8, 12, 6, 2
RNG = np.random.default_rng(0)
H = RNG.normal(size=(B, T, D)).astype(np.float32)
# Not every expert is used, and not equally often.
LOGITS = (2 * RNG.normal(size=(B, T, E)) + [3, 0, 0, 1, -9, -9]).astype(np.float32)
GATE, UP = RNG.normal(size=(2, E, D, F)).astype(np.float32)
DOWN = RNG.normal(size=(E, F, D)).astype(np.float32)
ARRAYS = (H, LOGITS, GATE, UP, DOWN)
LAYOUTS = (
    SPECS.hidden,
    SPECS.hidden,
    *(jax.P(*mixtral.EXPERTS_IN[1:]),) * 2,
    jax.P(*mixtral.EXPERTS_OUT[1:]),
)


def all_experts(h, logits, gate, up, down, normalized):
    """Every expert on every token, weighted by its probability if it is in the top."""
    p = jax.nn.softmax(logits, -1)
    ranks = jnp.sum(p[..., None] < p[..., None, :], -1)
    p = jnp.where(ranks < K, p, 0)
    if normalized:
        p = p / p.sum(-1, keepdims=True)
    gates, ups = (jnp.einsum("btd,edf->btef", h, w) for w in (gate, up))
    hidden = gates / (1 + jnp.exp(-gates)) * ups
    return jnp.einsum("btef,efd,bte->btd", hidden, down, p)


def ours(h, logits, *weights, normalized=True):
    probabilities = jax.nn.softmax(logits, -1)
    options = dict(per_token=K, normalized=normalized)
    return mixture(h, probabilities, *weights, **options)


def with_gradients(function):
    """The function's values, and the gradients of a weighted sum of them."""

    def total(*arrays):
        values = function(*arrays)
        weights = jnp.cos(jnp.arange(values.size)).reshape(values.shape)
        return jnp.sum(values * weights), values

    return jax.jit(jax.grad(total, range(5), has_aux=True))


def check(found, normalized, arrays=ARRAYS):
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in arrays]
        expected = with_gradients(lambda *a: all_experts(*a, normalized))(*wide)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_the_mixture_and_its_gradients():
    found = with_gradients(lambda *arrays: ours(*arrays, normalized=False))(*ARRAYS)
    check(found, normalized=False)
    assert not found[0][2][4:].any()  # no token chose the last experts


@pytest.mark.parametrize("sizes", [None, (1, 1, 2, 1)])
def test_second_derivatives(sizes):
    """Of the squared gradient of one group's weights, by those and by the inputs."""

    def derivatives(function, h, logits, gate, up, down):
        def squared(weight, h):
            total = lambda w: jnp.sum(jnp.sin(function(h, logits, w, up, down)))
            return jnp.sum(jnp.square(jax.grad(total)(weight)))

        return jax.jit(jax.grad(squared, (0, 1)))(gate, h)

    # In float64: products of four random matrices lose many digits in float32.
    with jax.enable_x64(True):
        exact = lambda *arrays: all_experts(*arrays, normalized=True)
        wide = [jnp.asarray(x, jnp.float64) for x in ARRAYS]
        expected = derivatives(exact, *wide)
        if sizes is None:
            found = derivatives(ours, *wide)
        else:
            with mesh(*sizes):
                found = derivatives(ours, *placed(wide))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max())


def placed(arrays):
    """The arrays in the layouts in which a model has them."""
    here = jax.sharding.get_mesh()
    layouts = (on_axes(spec, here) for spec in LAYOUTS)
    return [
        jax.device_put(x, jax.NamedSharding(here, spec))
        for x, spec in zip(arrays, layouts, strict=True)
    ]


@pytest.mark.parametrize(
    "sizes, favorite",
    [((2, 2, 2), 0), ((1, 2, 2, 2), 0), ((1, 1, 2, 1), 40)],
    ids=["experts on every device", "experts by device", "one device does all"],
)
def test_a_mesh_gives_the_same(sizes, favorite):
    """`favorite` is added to the logits of the first two experts."""
    logits = LOGITS + np.array([favorite] * K + [0] * (E - K), np.float32)
    arrays = H, logits, GATE, UP, DOWN
    with mesh(*sizes):
        inputs = placed(arrays)
        found = with_gradients(ours)(*inputs)
        for gradient, x in zip(found[0], inputs, strict=True):
            assert jax.typeof(gradient).sharding == jax.typeof(x).sharding
    check(found, True, arrays)


def test_gradients_of_weights_are_not_rounded_to_the_compute_dtype():
    """Their sums have factors in bfloat16, but are never rounded to it."""
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (H.reshape(-1, D), GATE))
    sizes = jnp.array([10, 0, 8, 5, 1, 0])
    product = lambda w: jnp.sum(grouped_product(x, w, sizes, jnp.float32))
    gradient = jax.grad(product)(w.astype(jnp.float32))
    assert gradient.dtype == jnp.float32
    ends = np.cumsum(sizes)
    rows = np.split(np.asarray(x, np.float64), ends[:-1])
    expected = np.stack([np.repeat(r.sum(0)[:, None], F, 1) for r in rows])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5)


def test_the_kernel_for_tpus_gives_the_same_products_when_interpreted():
    x, y = (RNG.normal(size=(300, n)).astype(np.float32) for n in (24, 16))
    sizes = np.array([37, 0, 150, 113, 0], np.int32)
    found = by_group_on_tpu(x, y, jnp.asarray(sizes), interpret=True)
    ends = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(x, ends), np.split(y, ends), strict=True)
    expected = np.stack([a.astype(float).T @ b for a, b in pairs])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    weight = RNG.normal(size=(5, 24, 16)).astype(np.float32)
    parts = zip(np.split(x, ends), weight.astype(float), strict=True)
    expected = np.concatenate([a @ b for a, b in parts])
    for transposed in (False, True):
        matrices = jnp.asarray(np.swapaxes(weight, 1, 2) if transposed else weight)
        options = dict(transposed=transposed, interpret=True)
        found = by_row_on_tpu(jnp.asarray(x), matrices, jnp.asarray(sizes), **options)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_experts_have_no_adapters_and_the_message_says_what_to_use():
    with pytest.raises(InputError, match="experts cannot have adapters; use attention"):
        lora_of(LoraOptions(rank=2), mixtral.FAMILY)
    lora = lora_of(LoraOptions(rank=2, targets="attention"), mixtral.FAMILY)
    names = ("query", "key", "value", "output")
    assert lora.adapted == tuple(f"layers.{name}" for name in names)


@pytest.fixture
def chips(monkeypatch):
    """Four chips of v5e that need not exist."""
    pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu)")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling
        "XLA_FLAGS": xla_flags_of_tpus(),
    }.items():
        monkeypatch.setenv(name, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1")
    return np.array(found.devices)


ROWS, TOKENS, HIDDEN, FEATURES, EXPERTS = 4, 512, 512, 512, 32


def compiled_on(chips, function, **sizes):
    """A step of the mixture on a mesh of these sizes, compiled for chips."""
    here = jax.sharding.Mesh(
        chips.reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Explicit,) * len(sizes),
    )
    shapes = [
        ((ROWS, TOKENS, HIDDEN), jnp.bfloat16),
        ((ROWS, TOKENS, EXPERTS), jnp.float32),
        ((EXPERTS, HIDDEN, FEATURES), jnp.float32),
        ((EXPERTS, HIDDEN, FEATURES), jnp.float32),
        ((EXPERTS, FEATURES, HIDDEN), jnp.float32),
    ]
    with jax.set_mesh(here):
        arrays = [
            jax.ShapeDtypeStruct(
                *shape, sharding=jax.NamedSharding(here, on_axes(spec, here))
            )
            for shape, spec in zip(shapes, LAYOUTS, strict=True)
        ]
        total = lambda *a: jnp.sum(jnp.square(function(*a).astype(jnp.float32)))
        return jax.jit(jax.grad(total, range(5))).lower(*arrays).compile()


@pytest.mark.slow
def test_tpus_multiply_each_row_by_its_own_expert_only(chips):
    """FLOPs and collectives of a step of the mixture, from the TPU compiler."""
    step = compiled_on(chips, ours, data=1, fsdp=2, tensor=2)
    # Three matrices; each in the forward pass and for two gradients.
    needed = 9 * 2 * ROWS * TOKENS * K * HIDDEN * FEATURES / 4
    assert step.cost_analysis()["flops"] == pytest.approx(needed, rel=0.05)
    text = step.as_text()
    assert text.count(" reduce-scatter(") == 3
    assert not re.search(r"f32\[32,(512|256),(512|256)\]\S* all-reduce", text)


@pytest.mark.slow
def test_tpus_move_tokens_and_their_own_experts_only(chips):
    recomputed = jax.checkpoint(ours)  # as layers are
    step = compiled_on(chips, recomputed, data=1, fsdp=2, expert=2, tensor=1)
    found = hlo.collectives(step.as_text(), devices=4, slices=1)
    own = EXPERTS // 2 * 3 * HIDDEN * FEATURES
    weights = (2 * 2 + 4) * own / 2  # gathered in bfloat16; gradients in float32
    states = ROWS // 4 * TOKENS * HIDDEN  # those of the other device of the axis
    moved = (3 * 2 + 2 * 4) * states
    # Scores and the numbers of experts come on top.
    assert hlo.wire_bytes(found) == pytest.approx(weights + moved, rel=0.01)
