"""Gemma 3 folders with a vision part: the text model is read, the rest is copied."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpref.errors import InputError
from jaxpref.models import RewardModel, build
from jaxpref.models.adapter_config import adapter_fields
from jaxpref.models.adapter_tensors import module_arrays
from jaxpref.models.folder import check_folder, load_params, save
from jaxpref.models.folder_config import architecture_from_fields
from jaxpref.models.lora import LoraOptions, lora_of
from jaxpref.plan.presets import PRESETS
from tests.family_cases import architecture_of, fields_of, random_params

ARCHITECTURE = architecture_of("gemma3_vision")
# As the published folders: what `Gemma3TextConfig` has by default is left out.
SCALING = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
PUBLISHED = {
    "gemma-3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    },
    "gemma-3-27b": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
    },
}
RNG = np.random.default_rng(0)
VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": RNG.normal(
        size=(8, 3, 2, 2)
    ).astype(ml_dtypes.bfloat16),
    "multi_modal_projector.mm_soft_emb_norm.weight": np.float32([1, np.nan, -0.0]),
}


def published(folder, rename=lambda name: name):
    """A random model with a vision part, in two files; its parameters."""
    model = build(ARCHITECTURE)
    params = random_params(model)
    save(folder, model, params, max_file_bytes=10_000)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_config": {"hidden_size": 8}, "boi_token_index": 61}
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    for file in files:
        tensors = {rename(n): x for n, x in load_file(folder / file).items()}
        if file == files[0]:
            tensors |= {rename(name): x for name, x in VISION.items()}
        index["weight_map"] |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file)
    held = {rename(name) for name in [*index["weight_map"], *VISION]}
    kept = {n: file for n, file in index["weight_map"].items() if n in held}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": kept})
    )
    return params


def as_modules(name):
    """The names of newer folders, those of the modules."""
    name = name.replace("language_model.model.", "model.language_model.")
    return f"model.{name}" if name in VISION else name


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_are_the_presets(name):
    text = {"model_type": "gemma3_text", "sliding_window": 1024, **SCALING}
    fields = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "text_config": text | PUBLISHED[name],
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    found = architecture_from_fields(fields, name)
    assert vars(found) == vars(PRESETS[name])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"text_config": {"surprise": 1}}, "text_config: field surprise is 1"),
        ({"text_config": {"model_type": "llama"}}, "text_config: field model_type"),
        ({"text_config": {"tie_word_embeddings": False}}, "tie_word_embeddings"),
        ({"text_config": None}, "field text_config is missing"),
        ({"audio_config": {"hidden_size": 8}}, "field audio_config"),
    ],
)
def test_what_is_not_supported_is_named(change, words):
    fields = fields_of("gemma3_vision")
    if isinstance(inner := change.get("text_config"), dict):
        change = {"text_config": fields["text_config"] | inner}
    with pytest.raises(InputError, match=words):
        architecture_from_fields(fields | change, "config.json")


@pytest.mark.parametrize("rename", [lambda name: name, as_modules])
def test_the_vision_part_is_copied_bit_for_bit(rename, tmp_path):
    params = published(tmp_path / "model", rename)
    model = build(check_folder(tmp_path / "model"))
    assert model.architecture == ARCHITECTURE
    jax.tree.map(
        np.testing.assert_array_equal, load_params(tmp_path / "model", model), params
    )
    for kind in (model, RewardModel(ARCHITECTURE)):
        params = random_params(kind)
        out = tmp_path / type(kind).__name__
        save(out, kind, params, tmp_path / "model", dtype="float16")
        stored = load_file(out / "model.safetensors")
        for name, value in VISION.items():
            found = stored.pop(rename(name))
            assert found.dtype == value.dtype and found.tobytes() == value.tobytes()
        prefixes = ("language_model.model.", "score.")
        assert all(name.startswith(prefixes) for name in stored)
        config = json.loads((out / "config.json").read_text())
        assert config["vision_config"] == {"hidden_size": 8}
        assert config["boi_token_index"] == 61 and config["model_type"] == "gemma3"
        assert check_folder(out) == ARCHITECTURE


def test_other_families_have_no_vision_part(tmp_path):
    model = build(architecture_of("llama"))
    save(tmp_path / "model", model, random_params(model))
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | VISION, path)
    with pytest.raises(InputError, match="tensor .* is not part of a llama model"):
        check_folder(tmp_path / "model")


def test_adapters_are_those_of_the_text_model_alone():
    """By the names of the modules in `transformers`, where towers have q_proj too."""
    model, family = build(ARCHITECTURE), ARCHITECTURE.family
    lora = lora_of(LoraOptions(rank=2, targets="q_proj,down_proj"), family)
    arrays = module_arrays(family, jax.eval_shape(model.init, jax.random.key(0)))
    fields = adapter_fields(lora, family, arrays, "base", False)
    module = "model.language_model.layers.2.self_attn.q_proj"
    assert arrays["layers.query"].tensors[2] == f"{module}.weight"
    match = lambda name: re.fullmatch(fields["target_modules"], name)
    assert match(module) and match("model.language_model.layers.0.mlp.down_proj")
    assert not match("model.language_model.layers.0.self_attn.k_proj")
    assert not match("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    plain = dataclasses.replace(lora_of(LoraOptions(rank=2), family))
    assert set(lora.adapted) < set(plain.adapted)
