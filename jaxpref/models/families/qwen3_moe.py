"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the MLP."""

import dataclasses
from typing import Any

from jaxpref.errors import InputError
from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama, mixtral, qwen3
from jaxpref.models.families.family import Family
from jaxpref.models.families.window import read_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeArchitecture(mixtral.ExpertsArchitecture):
    """The architecture of a Qwen3-MoE model."""

    dense_intermediate_size: int = at_least(1)
    """F of layers without experts; there are none, so it changes nothing."""

    @property
    def family(self) -> Family:
        """Qwen3-MoE."""
        return FAMILY


class Qwen3MoeBlock(mixtral.ExpertsBlock, qwen3.Qwen3Block):
    """Norms of each head's query and key, and a mixture of experts.

    Source: Qwen Team 2025, arXiv:2505.09388, section 2.
    """


class Qwen3MoeTransformer(llama.LlamaTransformer):
    """Qwen3-MoE's modules."""

    block = Qwen3MoeBlock


def read_config(fields: ConfigFields) -> Qwen3MoeArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    fields.require("hidden_act", "silu")
    fields.require("decoder_sparse_step", 1)
    if fields.get("mlp_only_layers"):
        raise InputError(
            f"{fields.source}: field mlp_only_layers is {fields.get('mlp_only_layers')}"
            "; only models with experts in every layer are supported"
        )
    sizes = llama.read_sizes(fields, max_position_embeddings=32768, num_kv_heads=4)
    dense = sizes.pop("intermediate_size")
    bias = fields.read("attention_bias", bool, False)
    windows = fields.read("use_sliding_window", bool, False)
    window = read_window(fields, 4096)
    return Qwen3MoeArchitecture(
        **sizes,
        projection_bias=bias,
        output_bias=bias,
        intermediate_size=fields.read("moe_intermediate_size", int, 768),
        dense_intermediate_size=dense,
        num_experts=_num_experts(fields),
        experts_per_token=fields.read("num_experts_per_tok", int, 8),
        normalized=fields.read("norm_topk_prob", bool, False),
        sliding_window=window if windows else None,
    )


def _num_experts(fields: ConfigFields) -> int:
    # Version 5 of transformers writes another name.
    number = fields.read("num_experts", int, fields.get("num_local_experts") or 128)
    fields.require("num_local_experts", number)
    return number


def write_config(architecture: Qwen3MoeArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    a = architecture
    return mixtral.write_sizes(a) | {
        "intermediate_size": a.dense_intermediate_size,
        "moe_intermediate_size": a.intermediate_size,
        "num_experts": a.num_experts,
        "norm_topk_prob": a.normalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": a.sliding_window is not None,
        "sliding_window": a.sliding_window,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=Qwen3MoeTransformer,
    tensors=mixtral.tensors("mlp", "gate_proj", "up_proj", "down_proj") | qwen3.NORMS,
    # All layers have the window, or none.
    harmless=(*mixtral.EXPERT_FIELDS, "max_window_layers"),
)
"""Qwen3-MoE, such as Qwen3-30B-A3B."""
