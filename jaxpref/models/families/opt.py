"""OPT: GPT-2 with a ReLU, and two unused rows before the learned positions."""

import dataclasses
from typing import Any

from jaxpref.errors import InputError
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import gpt2
from jaxpref.models.families.activations import read_activation
from jaxpref.models.families.family import Family, TensorName


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTArchitecture(gpt2.GPT2Architecture):
    """The architecture of an OPT model."""

    activation: str = "relu"

    @property
    def family(self) -> Family:
        """OPT."""
        return FAMILY


class OPTTransformer(gpt2.GPT2Transformer):
    """OPT's modules; position 0 is row 2 of the table."""

    first_position = 2


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_dim",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "activation_function",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "init_std",
}
"""Fields of the architecture, and their names in config.json."""
FIXED = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
"""Fields of config.json with the only supported value."""


def read_config(fields: ConfigFields) -> OPTArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    for name, supported in FIXED.items():
        fields.require(name, supported)
    hidden_size = fields.read("hidden_size", int)
    heads = fields.read("num_attention_heads", int)
    if heads < 1 or hidden_size % heads:
        raise InputError(
            f"{fields.source}: field num_attention_heads is {heads}, which does not "
            f"divide hidden_size={hidden_size}; check both"
        )
    fields.require("word_embed_proj_dim", hidden_size)
    return OPTArchitecture(
        vocab_size=fields.read("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.read("ffn_dim", int),
        num_layers=fields.read("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=fields.read("max_position_embeddings", int, 2048),
        tie_word_embeddings=fields.read("tie_word_embeddings", bool, True),
        initializer_range=fields.read("init_std", float, 0.02),
        activation=read_activation(fields, "activation_function", "relu"),
    )


def write_config(architecture: OPTArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    sizes = {theirs: getattr(architecture, ours) for ours, theirs in SIZES.items()}
    return FIXED | sizes | {"word_embed_proj_dim": architecture.hidden_size}


def _tensors(paths: dict[str, str], template: str) -> dict[str, TensorName]:
    """The weights and biases of modules, by path."""
    found = {}
    for path, module in paths.items():
        inputs = None if "norm" in path else 2 if path.endswith("output") else 1
        name = template.format(module)
        found[path] = TensorName(f"{name}.weight", inputs)
        found[f"{path}_bias"] = TensorName(f"{name}.bias", inputs and 0)
    return found


TENSORS = {
    "embed": TensorName("model.decoder.embed_tokens.weight"),
    "positions": TensorName("model.decoder.embed_positions.weight"),
    **_tensors(
        {
            "layers.attention_norm": "self_attn_layer_norm",
            "layers.query": "self_attn.q_proj",
            "layers.key": "self_attn.k_proj",
            "layers.value": "self_attn.v_proj",
            "layers.output": "self_attn.out_proj",
            "layers.mlp_norm": "final_layer_norm",
            "layers.up": "fc1",
            "layers.down": "fc2",
        },
        "model.decoder.layers.{{}}.{}",
    ),
    **_tensors({"norm": "final_layer_norm"}, "model.decoder.{}"),
    "head": TensorName("lm_head.weight", 1),
    "score": TensorName("score.weight", 1),
}

FAMILY = Family(
    model_type="opt",
    causal_lm="OPTForCausalLM",
    classifier="OPTForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=OPTTransformer,
    tensors=TENSORS,
    harmless=("activation_dropout", "layerdrop"),
    # Folders of the backbone alone have no prefix.
    rename=lambda name: f"model.{name}" if name.startswith("decoder.") else name,
)
"""OPT, but not OPT-350M, whose embeddings are projected and whose norms come last."""
