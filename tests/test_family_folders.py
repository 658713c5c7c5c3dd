"""Folders as others write them, and what each family refuses by name."""

import json

import jax
import numpy as np
import pytest

from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import (
    architecture_from_fields,
    architecture_to_fields,
    read_architecture,
)
from tests.family_cases import architecture_of, fields_of, random_params
from tests.test_models import mesh

safetensors = pytest.importorskip("safetensors.numpy")


def saved(case, folder):
    model = build(architecture_of(case))
    params = random_params(model)
    save(folder, model, params)
    return model, params


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = change(safetensors.load_file(path))
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


def without_prefix(tensors):
    """As the folder of the first GPT-2, with its masks."""
    short = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.uint8) for i in range(3)}
    return short | masks | {"h.0.attn.masked_bias": np.array(-1e4, np.float32)}


def of_backbone(tensors):
    return {name.removeprefix("model."): x for name, x in tensors.items()}


def with_buffers(tensors):
    """As the folders of Pythia, but with the head's newer name."""
    more, layer = {}, "gpt_neox.layers.{}.attention."
    for i in range(3):
        prefix = layer.format(i)
        more[f"{prefix}bias"] = np.ones((1, 1, 8, 8), bool)
        more[f"{prefix}masked_bias"] = np.array(-1e9, np.float32)
        more[f"{prefix}rotary_emb.inv_freq"] = np.ones(2, np.float16)
    head = tensors.pop("embed_out.weight")
    return tensors | more | {"lm_head.weight": head}


@pytest.mark.parametrize(
    "case, change",
    [("gpt2", without_prefix), ("gpt_neox", with_buffers), ("opt", of_backbone)],
)
def test_older_and_newer_tensor_names_are_read(case, change, tmp_path):
    model, params = saved(case, tmp_path)
    edit_tensors(tmp_path, change)
    found = load_params(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def read(fields):
    return architecture_from_fields(fields, "config.json")


OLDER = {
    "gpt_neox no biases": {
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "phi3 longrope": {
        "rope_scaling": fields_of("phi3 longrope")["rope_scaling"] | {"type": "su"}
    },
    "gpt2": {"n_inner": None, "n_ctx": 128, "summary_type": "cls_index"},
    "qwen3_moe": {"num_experts": None, "num_local_experts": 4},
    "mixtral": {"head_dim": None, "rope_theta": 1e6, "router_jitter_noise": 0.1},
    "olmoe": {"router_aux_loss_coef": 0.01, "clip_qkv": None},
    "opt": {
        "word_embed_proj_dim": 16,
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.1,
        "layerdrop": 0.1,
        "prefix": "</s>",
    },
    "stablelm": {
        "partial_rotary_factor": 0.25,
        "head_dim": 8,
        "qk_layernorm": False,
        "hidden_dropout": 0.1,
    },
    "stablelm parallel": {
        "rope_parameters": None,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_theta": 500,
    },
}


@pytest.mark.parametrize("case", OLDER)
def test_configs_as_others_write_them_mean_the_same(case):
    assert read(fields_of(case) | OLDER[case]) == architecture_of(case)


NEWER = {
    "gpt_neox no biases": {
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "phi3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        }
    },
    "stablelm parallel": {
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
        }
    },
}


@pytest.mark.parametrize("case", NEWER)
def test_rotary_fields_of_version_5_mean_the_same(case):
    old = ("rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor")
    fields = {name: x for name, x in fields_of(case).items() if name not in old}
    assert read(fields | NEWER[case]) == architecture_of(case)


def test_phi3_writes_the_three_fields_of_a_scaling_that_version_4_accepts():
    architecture = architecture_of("phi3 longrope")
    fields = architecture_to_fields(architecture)
    assert set(fields["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert fields["original_max_position_embeddings"] == 112
    assert json.loads(json.dumps(fields)) == fields


@pytest.mark.parametrize(
    "case, changes, words",
    [
        ("gpt2", {"activation_function": "gelu_python"}, "activation_function is 'ge"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"n_head": 3}, "n_head is 3, which does not divide n_embd=16"),
        ("gpt2", {"n_positions": 2**31 - 1, "n_embd": 2**18}, "max_position"),
        ("gpt_neox", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("gpt_neox", {"num_attention_heads": 5}, "num_attention_heads is 5"),
        ("gpt_neox", {"rotary_pct": 0.2}, "has 1 rotated features"),
        ("granite", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmo2", {"sliding_window": 8}, "sliding_window is 8"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod is 2"),
        ("phi3", {"attention_bias": True}, "attention_bias is True"),
        ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token=5 is more than"),
        ("mixtral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_inter"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv is -1.0"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim is 8; only 16"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is Tr"),
        ("opt", {"enable_bias": False}, "enable_bias is False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_"),
        ("opt", {"activation_function": "swish"}, "activation_function is 'swish'"),
        ("opt", {"num_attention_heads": 3}, "num_attention_heads is 3, which"),
        ("stablelm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("stablelm", {"head_dim": 6}, "head_dim is 6; only 8"),
        ("stablelm", {"num_attention_heads": 3}, "num_attention_heads is 3, which"),
        ("stablelm", {"partial_rotary_factor": 0.4}, "has 3 rotated features"),
        ("stablelm", {"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0"),
        ("stablelm", {"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_a_family_cannot_honor_is_named(case, changes, words):
    with pytest.raises(InputError, match=words):
        read(fields_of(case) | changes)


def test_a_tensor_under_two_names_is_named(tmp_path):
    model, _ = saved("gpt_neox", tmp_path)
    double = lambda tensors: tensors | {"lm_head.weight": tensors["embed_out.weight"]}
    edit_tensors(tmp_path, double)
    with pytest.raises(InputError, match="embed_out.weight is stored twice"):
        load_params(tmp_path, model)


def test_a_mesh_that_cannot_hold_the_experts_is_named():
    model = build(read(fields_of("mixtral") | {"intermediate_size": 21}))
    with mesh(1, 1, 2), pytest.raises(InputError, match="intermediate_size=21"):
        jax.eval_shape(model.init, jax.random.key(0))


def test_experts_that_are_missing_are_named(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    model, _ = saved("mixtral", tmp_path)
    edit_tensors(
        tmp_path, lambda tensors: {n: x for n, x in tensors.items() if n != name}
    )
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        load_params(tmp_path, model)
    assert read_architecture(tmp_path) == model.architecture
