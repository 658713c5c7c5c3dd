"""Small models of every family with odd choices, as fields of a config.json."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models.folder_config import architecture_from_fields

SIZES = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
NO_GROUPS = {"num_key_value_heads": ...}
"""Of a family whose heads all have their own keys; see `fields_of`."""
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
} | dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ),
    ...,
)
OPT = {"model_type": "opt", "ffn_dim": 24, "init_std": 0.3} | dict.fromkeys(
    ("intermediate_size", "num_key_value_heads", "initializer_range"), ...
)
CASES = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
        "tie_word_embeddings": True,
    },
    "llama yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama yarn mscale": {
        "model_type": "llama",
        "rope_parameters": YARN
        | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0, "truncate": False},
    },
    "llama dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e3},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral no window": {
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 8,
        "num_key_value_heads": 1,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "qwen3 tied": {
        "model_type": "qwen3",
        "head_dim": 6,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "gemma": {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 5,
        "sliding_window": 6,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma2 plain": {
        "model_type": "gemma2",
        "head_dim": 6,
        "sliding_window": 300,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": [FULL, SLIDING, FULL],
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": [SLIDING, SLIDING, FULL],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma3 caps": {
        "model_type": "gemma3_text",
        "head_dim": 6,
        "sliding_window": 7,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
    "gemma3_vision": {
        **dict.fromkeys(SIZES, ...),
        "model_type": "gemma3",
        "text_config": {
            **{name: SIZES[name] for name in SIZES if not name.endswith("_id")},
            "model_type": "gemma3_text",
            "head_dim": 6,
            "query_pre_attn_scalar": 5,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 1,
        "boi_token_index": 61,
        "eoi_token_index": 62,
        "image_token_index": 63,
        "initializer_range": 0.3,
    },
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3 windows": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": [SLIDING, SLIDING, FULL],
        "tie_word_embeddings": False,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo2 biases": {
        "model_type": "olmo2",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "attention_bias": True,
    },
    "phi3": {
        "model_type": "phi3",
        "head_dim": 8,
        "partial_rotary_factor": 0.75,
        "sliding_window": 6,
    },
    "phi3 longrope": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 112,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 3.0],
        },
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.7,
    },
    "granite biases": {
        "model_type": "granite",
        "attention_multiplier": 0.35,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 6,
    },
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 32, **NO_GROUPS},
    "gpt_neox sequential": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "rotary_pct": 1.0,
        "rotary_emb_base": 500,
        "hidden_act": "gelu_fast",
        "layer_norm_eps": 1e-3,
        **NO_GROUPS,
    },
    "gpt_neox no biases": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "attention_bias": False,
        "rotary_pct": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        **NO_GROUPS,
    },
    "gpt2": GPT2,
    "gpt2 untied": GPT2
    | {
        "tie_word_embeddings": False,
        "n_inner": 24,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-3,
    },
    "gpt2 scaled by layer": GPT2
    | {"n_embd": 24, "n_head": 8, "scale_attn_by_inverse_layer_idx": True},
    "gpt2 unscaled": GPT2 | {"n_head": 2, "scale_attn_weights": False},
    "stablelm": {"model_type": "stablelm", "hidden_size": 32},
    "stablelm parallel": {
        "model_type": "stablelm",
        "hidden_size": 32,
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.75,
        "layer_norm_eps": 1e-3,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    },
    "stablelm normed heads": {
        "model_type": "stablelm",
        "qk_layernorm": True,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 1,
    },
    "opt": OPT,
    "opt untied": OPT | {"tie_word_embeddings": False, "activation_function": "gelu"},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "mixtral tied": {
        "model_type": "mixtral",
        "tie_word_embeddings": True,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "head_dim": 6,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe window": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 4,
        "head_dim": 6,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "num_key_value_heads": 4,
    },
    "olmoe": {
        "model_type": "olmoe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
    },
    "olmoe clipped": {
        "model_type": "olmoe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "clip_qkv": 0.8,
        "attention_bias": True,
    },
}
"""The first case of a family has its name."""


def fields_of(case: str) -> dict:
    """The whole config.json of a case."""
    fields = SIZES | CASES[case]
    return {name: x for name, x in fields.items() if x is not ...}


def architecture_of(case: str):
    """The architecture of a case."""
    return architecture_from_fields(fields_of(case), case)


def random_params(model, seed: int = 0):
    """Parameters that are all random, gains and biases too, in the mesh's layout."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(0, 0.25, leaf.shape).astype(leaf.dtype)
        if leaf.sharding is None:
            return jnp.asarray(values)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.device_put(values, sharding)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))
