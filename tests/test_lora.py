"""Adapters and frozen parts: the function, its gradient, and folders of peft."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpref.errors import InputError
from jaxpref.models import RewardModel
from jaxpref.models.adapter_files import load_adapter, read_lora, save_adapter
from jaxpref.models.families import llama
from jaxpref.models.folder import load_params, save
from jaxpref.models.linear import factored
from jaxpref.models.lora import LoraOptions, adapted_paths, lora_of
from jaxpref.models.partition import part_of
from jaxpref.models.paths import by_path, nested
from jaxpref.models.stored import stored_params
from jaxpref.models.weights import Weights, load_weights
from tests.test_models import TOKENS, mesh, replace

MODEL = replace()
MATRICES = "query key value output gate up down".split()
SPLIT = {"output": 2}  # axes of the inputs; one in all others


def adapters(model=MODEL, *, seed=0, **options):
    """An adapter that changes the function, as `Lora` and arrays."""
    lora = lora_of(LoraOptions(**{"rank": 3, **options}), llama.FAMILY)
    rng = np.random.default_rng(seed)
    arrays = lora.trained({}, model, jax.random.key(0))
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    return lora, jax.tree.map(draw, arrays)


def merged(params, lora, arrays):
    """W + s a b, with numpy."""
    params = jax.tree.map(np.asarray, params)
    layers = dict(params["layers"])
    for name in (path.removeprefix("layers.") for path in lora.adapted):
        a, b = (np.asarray(arrays["layers"][name][x]) for x in "ab")
        product = np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b)])
        layers[name] = layers[name] + lora.scale * product
    return params | {"layers": layers}


def of_logits(model):
    """A scalar function of all logits."""
    return lambda params: jnp.sum(jnp.sin(model.logits(params, TOKENS[:2])))


def test_a_new_adapter_changes_no_bit():
    params = MODEL.init(jax.random.key(0))
    lora = lora_of(LoraOptions(rank=4, rank_stabilized=True), llama.FAMILY)
    new = lora.trained({}, MODEL, jax.random.key(1))
    assert float(jnp.abs(new["layers"]["gate"]["a"]).max()) <= 16**-0.5  # kaiming
    assert float(jnp.std(new["layers"]["gate"]["a"])) == pytest.approx(
        (16 * 3) ** -0.5, rel=0.15
    )
    logits = jax.jit(MODEL.logits)
    np.testing.assert_array_equal(
        logits(lora.join(new, params), TOKENS), logits(params, TOKENS)
    )


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "remat, targets",
    [("full", "all"), slow("none", "all"), slow("dots", "q_proj,down_proj")],
)
def test_an_adapted_model_is_the_merged_one(remat, targets):
    """So are its gradients, with that G of W + s a b: s G b^T of a, s a^T G of b."""
    with jax.enable_x64(True):
        model = replace(param_dtype="float64", compute_dtype="float64", remat=remat)
        params = model.init(jax.random.key(0))
        lora, arrays = adapters(model, targets=targets, alpha=5.0)
        assert lora.scale == 5 / 3
        value = of_logits(model)
        found, gradient = jax.jit(
            jax.value_and_grad(lambda x: value(lora.join(x, params)))
        )(arrays)
        of_merged = jax.jit(jax.value_and_grad(value))
        expected, whole = of_merged(merged(params, lora, arrays))
        assert float(found) == pytest.approx(float(expected), abs=1e-10)
        assert abs(float(found) - float(of_merged(params)[0])) > 1e-2
        for path in lora.adapted:
            name = path.removeprefix("layers.")
            a, b = (np.asarray(arrays["layers"][name][x]) for x in "ab")
            G = np.asarray(whole["layers"][name])
            assert a.ndim == SPLIT.get(name, 1) + 2
            for layer in range(2):
                flat_a, flat_b = a[layer].reshape(-1, 3), b[layer].reshape(3, -1)
                flat = G[layer].reshape(len(flat_a), -1)
                of_a = lora.scale * flat @ flat_b.T
                of_b = lora.scale * flat_a.T @ flat
                for factor, expected in {"a": of_a, "b": of_b}.items():
                    of_factor = np.asarray(gradient["layers"][name][factor][layer])
                    np.testing.assert_allclose(
                        of_factor.reshape(expected.shape), expected, rtol=0, atol=1e-11
                    )


def products(function, *arguments):
    """The shapes of the results of all products in a function's program."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(part, "jaxpr"):
                        part = part.jaxpr
                    if hasattr(part, "eqns"):
                        visit(part)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def test_frozen_weights_have_no_gradient_in_the_program():
    """Neither the layers' nor the tied head's; counted in the program itself."""
    model = replace(tie_word_embeddings=True, remat="full")
    params = model.init(jax.random.key(0))
    lora, arrays = adapters(model)
    weights = {x.shape[1:] for x in jax.tree.leaves(params["layers"]) if x.ndim > 2}
    weights.add(params["embed"].shape[::-1])
    value = of_logits(model)
    full = products(jax.grad(value), params)
    assert weights <= set(full)  # so this test would see one
    found = products(jax.grad(lambda x, p: value(lora.join(x, p))), arrays, params)
    assert not weights & set(found)


@pytest.mark.parametrize(
    "train", [slow("last:1"), slow("last:2"), slow("no-embeddings"), "head"]
)
def test_a_part_has_the_values_and_gradients_of_the_whole(train):
    params = MODEL.init(jax.random.key(0))
    part = part_of(train, MODEL)
    trained, frozen = part.trained(params, MODEL, None), part.frozen(params)
    sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert sizes(trained) + sizes(frozen) == sizes(params)
    value = of_logits(MODEL)
    joined = lambda trained, frozen: value(part.join(trained, frozen))
    found = jax.jit(jax.grad(joined))(trained, frozen)
    whole = part.trained(jax.jit(jax.grad(value))(params), MODEL, None)
    for path, gradient in by_path(found).items():
        expected = by_path(whole)[path]
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=2e-5)
    assert bool(found["head"].any())
    assert "embed" not in trained
    # No more products than the trained layers need.  A loop over layers counts once.
    everything, some = (
        len(products(jax.grad(f), *x))
        for f, x in ((value, (params,)), (joined, (trained, frozen)))
    )
    forward = len(products(value, params))
    expected = {"last:1": everything + forward - 1, "head": forward + 1}
    assert some == expected.get(train, everything)


def test_what_train_may_name():
    tied = replace(tie_word_embeddings=True)
    assert part_of("all", MODEL) is None
    assert part_of("head", RewardModel(MODEL.architecture)).whole == ("score",)
    assert "head" not in part_of("no-embeddings", tied).whole
    for train, model, message in (
        ("head", tied, "its embedding"),
        ("last:0", MODEL, "the model has 2 layers"),
        ("last:3", MODEL, "the model has 2 layers"),
        ("last", MODEL, "use all, head, last:N"),
        ("tail:1", MODEL, "use all, head, last:N"),
    ):
        with pytest.raises(InputError, match=message):
            part_of(train, model)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("dora", [False, True])
def test_eight_devices_compute_the_same(sizes, dora):
    params = MODEL.init(jax.random.key(0))
    lora, arrays = dora_adapters(MODEL, params) if dora else adapters()
    value = of_logits(MODEL)
    both = jax.value_and_grad(lambda x, p: value(lora.join(x, p)))
    eight = TOKENS
    value = lambda params: jnp.sum(jnp.sin(MODEL.logits(params, eight)))
    expected, gradient = jax.jit(both)(arrays, params)
    with mesh(*sizes):
        place = lambda x, like: jax.device_put(
            x, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
        )
        shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
        new = lora.trained({}, MODEL, jax.random.key(0))
        found, sharded = jax.jit(both)(
            jax.tree.map(place, arrays, new), jax.tree.map(place, params, shapes)
        )
        b = new["layers"]["output"]["b"]  # [L, r, D], as the weight [L, H, K, D]
        assert jax.typeof(b).sharding.spec == jax.P(None, None, "fsdp")
    assert float(found) == pytest.approx(float(expected), abs=2e-3)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(sharded)):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_products_with_a_low_rank_weight():
    assert factored("btd,dhk->bthk") == ("btd,dr->btr", "btr,rhk->bthk")
    assert factored("bthk,hkd->btd") == ("bthk,hkr->btr", "btr,rd->btd")


def test_targets_are_groups_or_modules():
    paths = lambda targets: [p[7:] for p in adapted_paths(targets, llama.FAMILY)]
    assert paths("all") == paths("attention,mlp") == MATRICES
    assert paths("mlp") == ["gate", "up", "down"]
    assert paths("v_proj, q_proj") == ["query", "value"]
    with pytest.raises(InputError, match="some of attention, mlp, all, q_proj"):
        paths("lm_head")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 2.0}, "--lora.alpha 2.0: has no effect without adapters"),
        ({"rank_stabilized": True}, "--lora.rank-stabilized"),
        ({"rank": 0}, "--lora.rank 0"),
        ({"dropout": 1.0}, "--lora.dropout 1.0: must be at least 0 and below 1"),
        ({"rank": 1, "alpha": 0.0}, "--lora.alpha 0.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        LoraOptions(**options)


# --- folders


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder in bfloat16, as most are, and its parameters in float32."""
    folder = tmp_path_factory.mktemp("base")
    save(folder, MODEL, MODEL.init(jax.random.key(0)), dtype="bfloat16")
    return folder, load_params(folder, MODEL)


def saved(folder, lora, arrays, model=MODEL, **changes):
    options = dict(base="org/base", dtype="float32", reward=False)
    save_adapter(folder, lora, model, arrays, **options | changes)
    return folder


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_folder_is_read_back(base, tmp_path):
    lora, arrays = adapters(targets="attention,up_proj", rank_stabilized=True)
    folder = saved(tmp_path, lora, arrays)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "org/base"
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (3, 6, True)
    assert sorted(fields["target_modules"]) == sorted(
        "q_proj k_proj v_proj o_proj up_proj".split()
    )
    stored = load_file(folder / "adapter_model.safetensors")
    names = [
        f"base_model.model.model.layers.1.self_attn.o_proj.lora_{x}.weight"
        for x in "AB"
    ]
    a, b = (stored[name] for name in names)
    of_output = arrays["layers"]["output"]
    np.testing.assert_array_equal(a, of_output["a"][1].reshape(24, 3).T)
    np.testing.assert_array_equal(b, of_output["b"][1].T)
    again, loaded = load_adapter(folder, MODEL)
    assert again == lora and read_lora(folder, MODEL) == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, arrays)
    whole = load_weights(Weights(base[0], folder), MODEL)
    jax.tree.map(np.testing.assert_array_equal, whole, lora.join(arrays, base[1]))


def test_the_export_is_merged_without_rounding_the_base(base, tmp_path):
    lora, arrays = adapters()
    save(tmp_path / "out", MODEL, lora.exported(arrays, stored_params(base[0], MODEL)))
    found = load_params(tmp_path / "out", MODEL)
    expected = merged(base[1], lora, arrays)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found["embed"], base[1]["embed"])


def test_a_part_is_exported_with_the_rest_of_the_folder(base, tmp_path):
    part = part_of("last:1", MODEL)
    trained = jax.tree.map(lambda x: x + 1, part.trained(base[1], MODEL, None))
    save(tmp_path / "o", MODEL, part.exported(trained, stored_params(base[0], MODEL)))
    found = load_params(tmp_path / "o", MODEL)
    np.testing.assert_array_equal(found["embed"], base[1]["embed"])
    np.testing.assert_array_equal(found["norm"], base[1]["norm"] + 1)
    for name, leaf in found["layers"].items():
        np.testing.assert_array_equal(leaf[0], base[1]["layers"][name][0])
        np.testing.assert_array_equal(leaf[1], base[1]["layers"][name][1] + 1)


def test_ranks_and_scales_of_single_modules_are_read(base, tmp_path):
    """Layer 1 has no adapter, and up_proj of layer 0 another rank and alpha."""
    lora, arrays = adapters(targets="up_proj,q_proj")
    folder = saved(tmp_path, lora, arrays)
    path = folder / "adapter_model.safetensors"
    stored = {k: v for k, v in load_file(path).items() if "layers.0" in k}
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    rng = np.random.default_rng(1)
    stored[name.format("A")] = rng.normal(size=(5, 16)).astype(np.float32)
    stored[name.format("B")] = rng.normal(size=(24, 5)).astype(np.float32)
    save_file(stored, path)
    edit(folder, alpha_pattern={"up_proj": 20}, rank_pattern={"up_proj": 5})
    params = load_weights(Weights(base[0], folder), MODEL)
    up, query = (params["layers"][x] for x in ("up", "query"))
    change = lambda w: (
        w.scale
        * np.stack(
            [np.tensordot(a, b, 1) for a, b in zip(np.asarray(w.a), np.asarray(w.b))]
        )
    )
    expected = 20 / 5 * (stored[name.format("B")] @ stored[name.format("A")]).T
    # Both are float32 sums of products of about 3.
    np.testing.assert_allclose(change(up)[0], expected, rtol=1e-5, atol=1e-5)
    of_query = arrays["layers"]["query"]
    expected = 6 / 3 * np.tensordot(*(np.asarray(of_query[x][0]) for x in "ab"), 1)
    np.testing.assert_allclose(change(query)[0], expected, rtol=1e-5, atol=1e-5)
    assert not change(up)[1].any() and not change(query)[1].any()


def test_a_reward_head_is_saved_whole(tmp_path):
    model = RewardModel(MODEL.architecture)
    lora, arrays = adapters(targets="v_proj")
    lora = dataclasses.replace(lora, whole=("score",))
    arrays |= {"score": jnp.arange(16.0)[:, None]}
    folder = saved(tmp_path, lora, arrays, model, reward=True)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored["base_model.model.score.weight"].shape == (1, 16)
    again, loaded = load_adapter(folder, model)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, arrays)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bias": "all"}, "field bias is 'all'"),
        ({"peft_type": "IA3"}, "field peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "changes the weights of the base"),
        ({"lora_bias": True}, "field lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, "field layer_replication"),
        ({"trainable_token_indices": [1]}, "field trainable_token_indices"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '\\(' is not a pattern"),
        ({"lora_alpha": 0}, "must be above 0"),
    ],
)
def test_adapters_that_are_refused(fields, message, tmp_path):
    folder = saved(tmp_path, *adapters(targets="v_proj"))
    edit(folder, **fields)
    with pytest.raises(InputError, match=message) as error:
        read_lora(folder, MODEL)
    assert "\n" not in str(error.value) and "adapter_config.json" in str(error.value)


def test_adapters_of_other_models_are_refused(tmp_path):
    lora, arrays = adapters(targets="v_proj")
    folder = saved(tmp_path / "whole", lora, arrays)
    for model, message in (
        (replace(num_layers=1), "layers.1.*not the adapter of a matrix"),
        (replace(hidden_size=8), "has shape \\[3, 16\\], but the model needs \\[3, 8"),
    ):
        with pytest.raises(InputError, match=message):
            read_lora(folder, model)
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if "lora_B" in name)
    save_file({k: v for k, v in stored.items() if k != name}, path)
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        read_lora(folder, MODEL)
    with pytest.raises(InputError, match="has no adapter_config.json"):
        read_lora(tmp_path, MODEL)
    bad = jax.tree.map(lambda x: x * jnp.inf, arrays)
    with pytest.raises(InputError, match="is not finite in float32"):
        saved(tmp_path / "bad", lora, bad)


def test_paths_of_nested_dicts():
    tree = {"b": {"d": 1, "c": {"e": 2}}, "a": 3}
    assert by_path(tree) == {"a": 3, "b.c.e": 2, "b.d": 1}
    assert nested(by_path(tree)) == tree


# --- DoRA


def dora_adapters(model=MODEL, params=None, **options):
    """An adapter with norms that differ from those of the base."""
    lora, arrays = adapters(model, dora=True, **options)
    start = lora.trained(params or {}, model, jax.random.key(0))
    rng = np.random.default_rng(5)
    for name, leaf in start["layers"].items():
        if "m" in leaf:
            arrays["layers"][name]["m"] = leaf["m"] * rng.uniform(
                0.5, 1.5, leaf["m"].shape
            ).astype(leaf["m"].dtype)
    return lora, arrays


def with_norms(params, lora, arrays):
    """The weights m (W + s a b) / |W + s a b|, norms over the inputs, with numpy."""
    whole = merged(params, lora, arrays)
    for name in (path.removeprefix("layers.") for path in lora.adapted):
        w, m = whole["layers"][name], np.asarray(arrays["layers"][name]["m"])
        inputs = tuple(range(1, SPLIT.get(name, 1) + 1))
        m = np.expand_dims(m, inputs)
        whole["layers"][name] = m * w / np.sqrt((w**2).sum(inputs, keepdims=True))
    return whole


def test_dora_scales_each_output_to_its_norm():
    """Its gradients are those of a function in which the norms are constants."""
    with jax.enable_x64(True):
        model = replace(param_dtype="float64", compute_dtype="float64")
        params = model.init(jax.random.key(0))
        lora, arrays = dora_adapters(model, params, targets="o_proj,up_proj")
        value = of_logits(model)
        found, gradient = jax.jit(
            jax.value_and_grad(lambda x: value(lora.join(x, params)))
        )(arrays)
        expected, whole = jax.jit(jax.value_and_grad(value))(
            with_norms(params, lora, arrays)
        )
        assert float(found) == pytest.approx(float(expected), abs=1e-10)
        plain = merged(params, lora, arrays)
        for name in ("output", "up"):
            a, b, m = (np.asarray(arrays["layers"][name][x]) for x in "abm")
            inputs = tuple(range(1, a.ndim - 1))
            w, G = plain["layers"][name], np.asarray(whole["layers"][name])
            norms = np.sqrt((w**2).sum(inputs))
            of_m = (G * w).sum(inputs) / norms
            G = G * np.expand_dims(m / norms, inputs)
            expected_b = [
                lora.scale * x.reshape(-1, 3).T @ y.reshape(len(x.reshape(-1, 3)), -1)
                for x, y in zip(a, G)
            ]
            got = gradient["layers"][name]
            np.testing.assert_allclose(got["m"], of_m, rtol=0, atol=1e-10)
            np.testing.assert_allclose(
                np.asarray(got["b"]).reshape(2, 3, -1), expected_b, rtol=0, atol=1e-10
            )


def test_new_dora_adapters_change_nothing_but_rounding(base, tmp_path):
    params = load_params(base[0], MODEL)
    lora = lora_of(LoraOptions(rank=2, dora=True), llama.FAMILY)
    new = lora.trained(params, MODEL, jax.random.key(0))
    norms = np.sqrt(np.square(np.asarray(params["layers"]["output"])).sum((1, 2)))
    np.testing.assert_allclose(new["layers"]["output"]["m"], norms, rtol=1e-6)
    logits = jax.jit(MODEL.logits)
    one, other = logits(lora.join(new, params), TOKENS), logits(params, TOKENS)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_dora_folders_and_merged_exports(base, tmp_path):
    lora, arrays = dora_adapters(MODEL, base[1], targets="q_proj,o_proj")
    folder = saved(tmp_path / "adapter", lora, arrays)
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"]
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    np.testing.assert_array_equal(
        stored[name], arrays["layers"]["query"]["m"][1].reshape(-1)
    )
    again, loaded = load_adapter(folder, MODEL)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, arrays)
    whole = with_norms(base[1], lora, arrays)
    save(tmp_path / "out", MODEL, lora.exported(arrays, stored_params(base[0], MODEL)))
    found = load_params(tmp_path / "out", MODEL)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    del stored[name]
    save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lora_magnitude_vector is missing; with use"):
        read_lora(folder, MODEL)
