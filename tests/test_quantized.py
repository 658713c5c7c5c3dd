"""Quantized frozen weights: levels, blocks, products, layouts, memory."""

import dataclasses
import math
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import norm

from jaxpref.errors import InputError
from jaxpref.models.families import llama
from jaxpref.models.folder import load_params, save
from jaxpref.models.lora import LoraOptions, lora_of
from jaxpref.models.paths import by_path, nested
from jaxpref.models.quantized import NF4, Quantized, encoded
from jaxpref.models.quantized_files import load_quantized
from jaxpref.models.weights import Weights
from jaxpref.sampling import lower
from jaxpref.scoring import make_scorer
from jaxpref.scoring.partition import PartitionScorer, Trained
from tests.test_lora import MATRICES, adapters, of_logits, products
from tests.test_models import TOKENS, mesh, replace

# Blocks of 64, 32 and 8 inputs; several blocks in `down` and `gate`.
MODEL = replace(
    hidden_size=128,
    intermediate_size=96,
    num_heads=4,
    head_dim=8,
    initializer_range=0.1,
)
STORED = {
    "query": "self_attn.q_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
BLOCKS = {"query": 64, "output": 8, "gate": 64, "down": 32}


def test_the_levels_are_those_of_the_paper():
    """Quantiles of the normal distribution, 8 above 0 and 7 below (appendix E)."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*above, 0.0, *below])
    # The paper lists what float32 arithmetic gave.
    np.testing.assert_allclose(NF4, levels / levels.max(), rtol=0, atol=4e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder in bfloat16, some of whose blocks are zero."""
    folder = tmp_path_factory.mktemp("model")
    params = MODEL.init(jax.random.key(0))
    gate = params["layers"]["gate"].at[1, :64, 3].set(0)
    params["layers"]["gate"] = gate
    save(folder, MODEL, params, dtype="bfloat16")
    return folder


def nearest(tensor, block, levels):
    """Blocks of a stored [outputs, inputs], each weight at its nearest level."""
    wide = tensor.astype(np.float64).reshape(-1, block)
    most = np.abs(wide).max(1, keepdims=True)
    shares = wide / np.where(most == 0, 1, most)
    at = np.abs(shares[..., None] - levels).argmin(-1)
    return (levels[at] * most).reshape(tensor.shape)


def layer_of(weight, layer):
    return jax.tree.map(lambda x: x[layer], weight)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_folder_is_read_into_the_nearest_levels(folder, kind):
    """Blocks are of inputs as the folder stores them, like those of bitsandbytes."""
    levels = np.array(NF4) if kind == "nf4" else np.arange(-127, 128) / 127
    params = load_quantized(folder, MODEL, kind)
    stored = load_file(folder / "model.safetensors")
    for name, module in STORED.items():
        weight = params["layers"][name]
        assert isinstance(weight, Quantized)
        for layer in range(2):
            tensor = stored[f"model.layers.{layer}.{module}.weight"]
            expected = nearest(tensor, BLOCKS[name], levels)
            found = layer_of(weight, layer).dequantized(jnp.float32)
            found = np.asarray(found).reshape(tensor.shape[::-1]).T
            # Halfway between two levels, either is the nearest.
            wide = tensor.astype(np.float64)
            equal = np.abs(found - expected) <= 1e-6 * np.abs(expected)
            tie = np.isclose(np.abs(found - wide), np.abs(expected - wide), rtol=1e-5)
            assert (equal | tie).all() and equal.mean() > 0.99
    # Whatever is no matrix of a layer is as in the folder.
    whole = load_params(folder, MODEL)
    for path, leaf in by_path(whole).items():
        if path.removeprefix("layers.") not in MATRICES:
            np.testing.assert_array_equal(by_path(params)[path], leaf)
    of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    bits = 8 * of(params["layers"]["gate"]) / whole["layers"]["gate"].size
    assert bits == {"nf4": 4.5, "int8": 8.5}[kind]  # 32 of 64 weights are a scale


def test_what_is_quantized_twice_stays(folder):
    """A dequantized block has the same codes."""
    values = np.random.default_rng(0).normal(size=(2, 64, 5)).astype(np.float32)
    for kind in ("nf4", "int8"):
        codes, scales = encoded(values, kind, 1)
        arrays = jnp.asarray(codes), jnp.asarray(scales)
        whole = Quantized(*arrays, kind, 1, None).dequantized(jnp.float32)
        again, same = encoded(np.asarray(whole), kind, 1)
        np.testing.assert_array_equal(codes, again)
        np.testing.assert_array_equal(scales, same)


def whole_of(params):
    """The same parameters, dequantized."""

    def dequantized(x):
        if not isinstance(x, Quantized):
            return x
        layers = [layer_of(x, n).dequantized(jnp.float32) for n in range(2)]
        return jnp.stack(layers)

    return nested({path: dequantized(x) for path, x in by_path(params).items()})


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_the_dequantized_model(folder, kind):
    """With adapters on some matrices, and the others quantized without one."""
    with jax.enable_x64(True):
        wide = dict.fromkeys(("param_dtype", "compute_dtype"), "float64")
        numerics = dataclasses.replace(MODEL.numerics, **wide)
        model = dataclasses.replace(MODEL, numerics=numerics)
        params = load_quantized(folder, model, kind)
        lora, arrays = adapters(model, targets="q_proj,down_proj")
        value = of_logits(model)
        both = jax.jit(jax.value_and_grad(lambda a, p: value(lora.join(a, p))))
        found, gradient = both(arrays, params)
        expected, other = both(arrays, whole_of(params))
        assert float(found) == pytest.approx(float(expected), abs=1e-10)
        for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other)):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-10)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_one_layer_is_dequantized_at_a_time(folder, remat):
    """No array of the program has the weights of two layers in floating point."""
    model = dataclasses.replace(
        MODEL, numerics=dataclasses.replace(MODEL.numerics, remat=remat)
    )
    params = load_quantized(folder, model, "nf4")
    lora, arrays = adapters(model)
    value = of_logits(model)
    step = jax.grad(lambda a, p: value(lora.join(a, p)))
    weights = {
        x.shape for x in jax.tree.leaves(MODEL.init(jax.random.key(0))["layers"])
    }
    matrices = {shape for shape in weights if len(shape) > 2}
    in_program = lambda *x: set(shapes_in(jax.make_jaxpr(step)(*x).jaxpr))
    assert matrices <= in_program(arrays, whole_of(params))  # so the test would see one
    assert not matrices & in_program(arrays, params)
    # Frozen weights have no gradient, either.
    assert not {shape[1:] for shape in matrices} & set(products(step, arrays, params))


def shapes_in(jaxpr):
    """The shapes of all floating-point arrays in a program."""
    for variable in jaxpr.invars:
        yield from floats(variable)
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield from floats(variable)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from shapes_in(part)


def floats(variable):
    if jnp.issubdtype(getattr(variable.aval, "dtype", int), jnp.floating):
        yield variable.aval.shape


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_every_mesh_has_the_same_codes(folder, sizes):
    """Three blocks of `down` do not divide two devices, nor two of `gate` eight."""
    params = load_quantized(folder, MODEL, "nf4")
    lora, arrays = adapters(MODEL)
    value = lambda p: jnp.sum(jnp.sin(MODEL.logits(p, TOKENS)))
    both = jax.value_and_grad(lambda a, p: value(lora.join(a, p)))
    expected, gradient = jax.jit(both)(arrays, params)
    with mesh(*sizes):
        sharded = load_quantized(folder, MODEL, "nf4")
        for path, leaf in by_path(params).items():
            jax.tree.map(
                np.testing.assert_array_equal,
                jax.tree.leaves(leaf),
                jax.tree.leaves(by_path(sharded)[path]),
            )
        new = lora.trained({}, MODEL, jax.random.key(0))
        place = lambda x, like: jax.device_put(
            x, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
        )
        found, other = jax.jit(both)(jax.tree.map(place, arrays, new), sharded)
        codes = sharded["layers"]["gate"].codes
        assert codes.addressable_shards[0].data.size * sizes[1] * sizes[2] == codes.size
        scorer = make_scorer(
            MODEL,
            frozenset({"policy_logps"}),
            trained=Trained(
                lora=LoraOptions(rank=2, base="nf4"),
                start=Weights(folder, quantization="nf4"),
            ),
        )
        of_plan = jax.eval_shape(lambda: scorer.init_frozen(jax.random.key(0)))
        same = lambda x, y: jax.typeof(x) == jax.typeof(y)
        assert jax.tree.all(jax.tree.map(same, of_plan["base"], sharded))
    # Sums in another order.
    assert float(found) == pytest.approx(float(expected), abs=2e-3)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other)):
        most = float(jnp.abs(one).max())
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * most)


def test_only_adapters_are_trained_on_quantized_weights():
    start = Weights(Path(), quantization="nf4")
    trained = Trained(start=start)
    with pytest.raises(InputError, match="--lora.base nf4: quantized weights cannot"):
        trained.partition(MODEL)
    assert LoraOptions(base="int8").rank is None  # for --adapter
    odd = replace(head_dim=7, num_heads=2, partial_rotary_factor=2 / 7)
    trained = Trained(lora=LoraOptions(rank=1), start=start)
    scorer = make_scorer(odd, frozenset({"policy_logps"}), trained=trained)
    with pytest.raises(InputError, match="layers.output has 7 inputs, an odd"):
        scorer.init_frozen(jax.random.key(0))


def test_the_reference_is_the_quantized_base(folder):
    """Frozen weights and a reference that is read again are the same arrays."""
    start = Weights(folder, quantization="nf4")
    lora = LoraOptions(rank=2, base="nf4")
    trained = Trained(lora=lora, start=start, reference=start)
    is_base = lambda trained: (
        cast(
            PartitionScorer, make_scorer(MODEL, frozenset(), trained=trained)
        ).reference_is_base
    )
    assert is_base(trained)
    other = Trained(lora=lora, start=start, reference=Weights(folder))
    assert not is_base(other)
    assert math.isclose(lora_of(lora, llama.FAMILY).scale, 2)


def test_the_sampler_reads_codes(folder):
    """It casts weights to the compute dtype, but not codes; traced, not compiled."""
    numerics = dataclasses.replace(MODEL.numerics, compute_dtype="bfloat16")
    model = dataclasses.replace(MODEL, numerics=numerics)
    params = load_quantized(folder, model, "nf4")
    prompts, lengths = jnp.ones((2, 4), jnp.int32), jnp.full(2, 4)
    program = lower(
        model, params, prompts, lengths, jax.random.key(0), max_new_tokens=2
    )
    assert "ui8" in program.as_text()
