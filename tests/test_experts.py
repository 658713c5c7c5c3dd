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
from jaxpref.models.grouped import by_group_on_tpu, grouped_product
from jaxpref.models.layout import SPECS
from jaxpref.models.lora import LoraOptions, lora_of
from tests.test_models import mesh

B, T, D, F, E, K = 4, 6, 8, 12, 5, 2
RNG = np.random.default_rng(0)
H = RNG.normal(size=(B, T, D)).astype(np.float32)
# Not every expert is used, and not equally often.
LOGITS = (2 * RNG.normal(size=(B, T, E)) + [3, 0, 0, 1, -9]).astype(np.float32)
GATE, UP = RNG.normal(size=(2, E, D, F)).astype(np.float32)
DOWN = RNG.normal(size=(E, F, D)).astype(np.float32)
ARRAYS = (H, LOGITS, GATE, UP, DOWN)


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


def check(found, normalized):
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in ARRAYS]
        expected = with_gradients(lambda *a: all_experts(*a, normalized))(*wide)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_the_mixture_and_its_gradients():
    found = with_gradients(lambda *arrays: ours(*arrays, normalized=False))(*ARRAYS)
    check(found, normalized=False)
    assert not found[0][2][4].any()  # no token chose the last expert


def test_second_derivatives():
    """Of the squared gradient of one group's weights, by those and by the inputs."""

    def squared(function, weight, h):
        total = lambda w: jnp.sum(jnp.sin(function(h, LOGITS, w, UP, DOWN)))
        return jnp.sum(jnp.square(jax.grad(total)(weight)))

    derivatives = lambda f: jax.jit(jax.grad(lambda *a: squared(f, *a), (0, 1)))
    found = derivatives(ours)(GATE, H)
    with jax.enable_x64(True):
        exact = lambda *arrays: all_experts(*arrays, normalized=True)
        wide = jnp.asarray(GATE, jnp.float64), jnp.asarray(H, jnp.float64)
        expected = derivatives(exact)(*wide)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


def test_a_mesh_gives_the_same():
    specs = (
        jax.P(("data", "fsdp"), None, None),
        jax.P(("data", "fsdp"), None, None),
        *(jax.P(*mixtral.EXPERTS_IN[1:]),) * 2,
        jax.P(*mixtral.EXPERTS_OUT[1:]),
    )
    with mesh(2, 2, 2):
        here = jax.sharding.get_mesh()
        placed = [
            jax.device_put(x, jax.NamedSharding(here, spec))
            for x, spec in zip(ARRAYS, specs, strict=True)
        ]
        found = with_gradients(ours)(*placed)
        for gradient, spec in zip(found[0], specs, strict=True):
            assert jax.typeof(gradient).sharding.spec == spec
    check(found, normalized=True)


def test_gradients_of_weights_are_not_rounded_to_the_compute_dtype():
    """Their sums have factors in bfloat16, but are never rounded to it."""
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (H.reshape(-1, D), GATE))
    sizes = jnp.array([10, 0, 8, 5, 1])
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


def test_experts_have_no_adapters_and_the_message_says_what_to_use():
    with pytest.raises(InputError, match="experts cannot have adapters; use attention"):
        lora_of(LoraOptions(rank=2), mixtral.FAMILY)
    lora = lora_of(LoraOptions(rank=2, targets="attention"), mixtral.FAMILY)
    names = ("query", "key", "value", "output")
    assert lora.adapted == tuple(f"layers.{name}" for name in names)


@pytest.mark.slow
def test_tpus_multiply_each_row_by_its_own_expert_only(monkeypatch):
    """FLOPs and collectives of a step of the mixture, from the TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu)")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling
    }.items():
        monkeypatch.setenv(name, value)
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1")
    here = jax.sharding.Mesh(
        np.array(chips.devices).reshape(1, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 3,
    )
    rows, tokens, hidden, features, experts = 4, 512, 512, 512, 32
    shapes = [
        ((rows, tokens, hidden), jnp.bfloat16, SPECS.hidden),
        ((rows, tokens, experts), jnp.float32, SPECS.hidden),
        ((experts, hidden, features), jnp.float32, jax.P(*mixtral.EXPERTS_IN[1:])),
        ((experts, hidden, features), jnp.float32, jax.P(*mixtral.EXPERTS_IN[1:])),
        ((experts, features, hidden), jnp.float32, jax.P(*mixtral.EXPERTS_OUT[1:])),
    ]
    with jax.set_mesh(here):
        arrays = [
            jax.ShapeDtypeStruct(s, d, sharding=jax.NamedSharding(here, spec))
            for s, d, spec in shapes
        ]
        total = lambda *a: jnp.sum(ours(*a).astype(jnp.float32))
        step = jax.jit(jax.grad(total, range(5))).lower(*arrays).compile()
    # Three matrices; each in the forward pass and for two gradients.
    needed = 9 * 2 * rows * tokens * K * hidden * features / 4
    assert step.cost_analysis()["flops"] == pytest.approx(needed, rel=0.05)
    text = step.as_text()
    assert text.count(" reduce-scatter(") == 3
    assert not re.search(r"f32\[32,(512|256),(512|256)\]\S* all-reduce", text)
