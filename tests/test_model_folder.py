"""Model folders: read bit for bit, written bit for bit, and refused by name."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpref.errors import InputError
from jaxpref.models import Numerics, RewardModel, build, families, tensor_files
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import check_folder, load_params, save
from jaxpref.models.folder_config import (
    architecture_from_fields,
    architecture_to_fields,
    read_architecture,
)
from jaxpref.models.rotary import LinearScaling, Llama3Scaling
from jaxpref.models.tokenizer_files import add_stop_tokens

safetensors = pytest.importorskip("safetensors.numpy")

CONFIG = LlamaArchitecture(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    rms_norm_eps=1e-6,
)
NAMES = ", ".join(sorted(family.model_type for family in families.FAMILIES))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes
    )


@pytest.fixture
def folder(tmp_path):
    """A small untied model on disk."""
    model = build(CONFIG)
    save(tmp_path / "model", model, random_params(model))
    return tmp_path / "model"


def edit_tensors(folder, change):
    tensors = safetensors.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))


def load(folder):
    model = build(read_architecture(folder))
    return model, load_params(folder, model)


def bits(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.load_file(path)
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}


def test_the_real_folder_round_trips_bit_for_bit(stories260k, tmp_path):
    model, params = load(stories260k)
    save(tmp_path / "out", model, params, stories260k)
    assert bits(tmp_path / "out") == bits(stories260k)
    assert read_architecture(tmp_path / "out") == model.architecture
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        copied = (tmp_path / "out" / name).read_bytes()
        assert copied == (stories260k / name).read_bytes()
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}  # no temporary left


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_dtype_is_kept_in_one_file_and_in_many(tmp_path, dtype, tied):
    model = build(LlamaArchitecture(**vars(CONFIG) | {"tie_word_embeddings": tied}))
    save(tmp_path / "one", model, random_params(model), dtype=dtype)
    stored = bits(tmp_path / "one")
    assert {str(d) for d, _, _ in stored.values()} == {dtype}
    assert ("lm_head.weight" in stored) != tied

    loaded, params = load(tmp_path / "one")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    save(tmp_path / "many", loaded, params, dtype=dtype, max_file_bytes=700)
    assert bits(tmp_path / "many") == stored
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    total = sum(len(data) for _, _, data in stored.values())
    assert index["metadata"]["total_size"] == total
    for path in (tmp_path / "many").glob("*.safetensors"):
        names = [n for n, file in index["weight_map"].items() if file == path.name]
        assert sorted(names) == sorted(safetensors.load_file(path))
        assert sum(len(stored[n][2]) for n in names) <= 700 or len(names) == 1

    # Parameters held in the stored dtype are the same bits too.
    narrow = build(loaded.architecture, Numerics(param_dtype=dtype))
    save(tmp_path / "again", narrow, load_params(tmp_path / "many", narrow))
    assert bits(tmp_path / "again") == stored


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_a_mesh_reads_and_writes_the_same_bits(folder, tmp_path, sizes):
    stored, (_, expected) = bits(folder), load(folder)
    names, types = ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, names, axis_types=types, devices=devices)
    with jax.set_mesh(mesh):
        model, params = load(folder)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.map(jax.typeof, params) == jax.tree.map(jax.typeof, shapes)
        save(tmp_path / "inside", model, params)
    save(tmp_path / "outside", model, params, max_file_bytes=1000)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert bits(tmp_path / "inside") == bits(tmp_path / "outside") == stored


def test_the_real_model_on_a_mesh_gives_the_same_logits(stories260k):
    tokens = np.random.default_rng(0).integers(0, 512, (4, 16))
    model, params = load(stories260k)
    expected = jax.jit(model.logits)(params, tokens)
    assert np.ptp(expected) > 10
    names, types = ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3
    with jax.set_mesh(jax.make_mesh((2, 2, 2), names, axis_types=types)):
        model, params = load(stories260k)
        found = jax.jit(model.logits)(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_mesh_reads_each_part_of_a_matrix_once(folder, monkeypatch):
    read = []

    class Counted:
        def __init__(self, tensor):
            self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype
            self.tensor = tensor

        def __getitem__(self, index):
            read.append(self.tensor[index])
            return read[-1]

    opened = tensor_files.open_file
    monkeypatch.setattr(
        tensor_files,
        "open_file",
        lambda path: {name: Counted(t) for name, t in opened(path).items()},
    )
    names, types = ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3
    with jax.set_mesh(jax.make_mesh((2, 2, 2), names, axis_types=types)):
        load(folder)
    matrices = [x for x in read if x.ndim == 2]
    stored = [shape for _, shape, _ in bits(folder).values() if len(shape) == 2]
    assert len(matrices) == 4 * len(stored)  # fsdp * tensor parts, copies read once
    assert sum(x.size for x in matrices) == sum(np.prod(s) for s in stored)


def test_files_can_be_read_by_whoever_can_read_the_config(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_saving_again_replaces_weights_and_nothing_else(folder):
    model, params = load(folder)
    (folder / "notes.txt").write_text("mine")
    save(folder, model, params, max_file_bytes=700)
    assert not (folder / WEIGHTS).exists() and (folder / "notes.txt").exists()
    other = random_params(model, seed=1)
    save(folder, model, other)
    assert not list(folder.glob("model-*")) and not (folder / INDEX).exists()
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], other)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(factor=2.0),
        Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=1024,
        ),
    ],
)
def test_rotary_fields_are_read_as_old_and_new_transformers_write_them(folder, scaling):
    config = LlamaArchitecture(
        **vars(CONFIG) | {"rope_theta": 5e5, "rope_scaling": scaling}
    )
    old = architecture_to_fields(config)
    assert architecture_from_fields(old, "x") == config
    new = dict(old)
    theta, nested = new.pop("rope_theta"), new.pop("rope_scaling")
    new["rope_parameters"] = {"rope_theta": theta, **nested}
    assert architecture_from_fields(new, "x") == config
    oldest = old | {"rope_scaling": dict(nested)}
    del oldest["rope_scaling"]["rope_type"]  # only `type`
    assert architecture_from_fields(oldest, "x") == config


def test_a_tied_folder_may_repeat_the_embedding_and_store_rotary_buffers(folder):
    edit_config(folder, tie_word_embeddings=True)
    embed = "model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[embed].copy()}))
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({buffer: np.ones(1, np.float32)}))
    assert "head" not in load(folder)[1]
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[embed] + 1}))
    with pytest.raises(InputError, match="lm_head.weight differs from .*embed_tokens"):
        load(folder)


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(QUERY), f"tensor {QUERY} is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing.*tie_word_emb"),
        (lambda t: t.update(odd=np.ones(1, np.float32)), "tensor odd is not part of"),
        (
            lambda t: t.update({QUERY.replace(".1.", ".2."): t[QUERY]}),
            "layers.2.self_attn.q_proj.weight is not part of .* with 2 layers",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY][:4].copy()}),
            rf"{QUERY} has shape \[4, 8\], but config.json says \[8, 8\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.full(8, np.nan, np.float32)}),
            "model.norm.weight holds NaN",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY].astype(np.int8)}),
            f"{QUERY} is stored as I8; convert",
        ),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=words) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "mamba"}, f"model_type is 'mamba'; supported: {NAMES}"),
        ({"use_sliding_window": True}, "use_sliding_window is True, .* not supported"),
        ({"num_experts": 8}, "num_experts is 8, which is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* delete the field"),
        ({"rope_scaling": {"type": "linear", "beta_fast": 32}}, "beta_fast is 32"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor=0.0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "low_freq_factor is miss",
        ),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"vocab_size": None}, "field vocab_size is missing"),
        ({"hidden_size": "8"}, "field hidden_size is '8', not int"),
        ({"num_hidden_layers": True}, "field num_hidden_layers is True, not int"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_named(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=words) as error:
        read_architecture(folder)
    assert str(error.value).count("config.json") == 1 and "\n" not in str(error.value)


def test_fields_that_change_nothing_are_accepted(folder):
    before = read_architecture(folder)
    off = {"use_sliding_window": False, "sliding_window": None, "pruned_heads": {}}
    others = {"attention_dropout": 0.1, "pretraining_tp": 1, "use_cache": True}
    edit_config(folder, **off, **others, rope_interleaved=False)
    assert read_architecture(folder) == before


def test_a_folder_is_checked_without_its_weights(folder, monkeypatch):
    nan = np.full(8, np.nan, np.float32)
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": nan}))
    assert check_folder(folder) == CONFIG
    with pytest.raises(InputError, match="holds no reward model"):
        check_folder(folder, RewardModel)
    check_folder(folder, RewardModel, new_head=True)
    edit_tensors(folder, lambda t: t.update({QUERY: t[QUERY][:4].copy()}))
    with pytest.raises(InputError, match=rf"{QUERY} has shape \[4, 8\]"):
        check_folder(folder)
    edit_tensors(folder, lambda t: t.update(odd=nan))
    with pytest.raises(InputError, match="tensor odd is not part of a llama model"):
        check_folder(folder)
    edit_config(folder, num_experts=8)
    with pytest.raises(InputError, match="num_experts"):
        check_folder(folder)


def cut_weights(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-9])


def remove_shard(folder):
    model, params = load(folder)
    save(folder, model, params, max_file_bytes=700)
    next(folder.glob("model-00002*")).unlink()


def leave_the_folder(folder):
    (folder / WEIGHTS).unlink()
    table = {"weight_map": {QUERY: "../other.safetensors"}}
    (folder / INDEX).write_text(json.dumps(table))


@pytest.mark.parametrize(
    "damage, words",
    [
        (shutil.rmtree, "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: not JSON"),
        (lambda f: (f / WEIGHTS).unlink(), "neither model.safetensors nor"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "not a complete safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 7), "not a complete safetensors"),
        (
            lambda f: (f / WEIGHTS).write_text("<html>" * 9),
            "not a complete safetensors",
        ),
        (cut_weights, "not a complete safetensors"),
        (remove_shard, "model-00002-of-.*no such file"),
        (leave_the_folder, "weight_map is not a table"),
    ],
)
def test_a_damaged_folder_is_an_input_error(folder, damage, words):
    damage(folder)
    with pytest.raises(InputError, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_model_and_no_rubbish(folder):
    model, params = load(folder)
    before, limits = bits(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="written .*too large.*; free some space"):
            save(folder, model, random_params(model, seed=1))
        with pytest.raises(InputError, match="cannot be written"):
            save(folder.parent / "new", model, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bits(folder) == before
    assert {p.name for p in folder.parent.iterdir()} == {"model"}


def test_what_cannot_be_saved_is_named(folder, tmp_path):
    model, params = load(folder)
    big = jax.tree.map(lambda x: x.at[0].set(1e6), params)
    with pytest.raises(InputError, match="tensor .* is not finite in float16"):
        save(tmp_path / "out", model, big, dtype="float16")
    with pytest.raises(InputError, match="no such folder to copy"):
        save(tmp_path / "out", model, params, tmp_path / "nowhere")
    with pytest.raises(InputError, match="saved in float32, .*not float64"):
        save(tmp_path / "out", model, params, dtype="float64")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "file" / "out", model, params)
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "file", model, params)
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "generation, config, stops, expected",
    [
        ({"eos_token_id": 2}, {}, (2,), {"eos_token_id": 2}),
        ({"eos_token_id": [3, 2]}, {}, (2, 3), {"eos_token_id": [3, 2]}),
        ({"eos_token_id": 3}, {}, (2, 3), {"eos_token_id": [3, 2]}),
        ({"top_k": 5}, {"eos_token_id": 3}, (2,), {"top_k": 5, "eos_token_id": [3, 2]}),
        (None, {"eos_token_id": 2}, (2,), None),
        (None, {"eos_token_id": 3}, (2,), {"eos_token_id": [3, 2]}),
        (None, {}, (2,), {"eos_token_id": [2]}),
        ({"eos_token_id": 3}, {}, (), {"eos_token_id": 3}),
    ],
)
def test_others_stop_at_the_tokens_that_end_answers_in_training(
    tmp_path, generation, config, stops, expected
):
    path = tmp_path / "generation_config.json"
    if generation is not None:
        path.write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    add_stop_tokens(tmp_path, stops)
    assert (json.loads(path.read_text()) if path.exists() else None) == expected
