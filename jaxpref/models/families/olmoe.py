"""OLMoE: experts, and norms of the queries and keys of all heads.

Axes: B rows, T tokens, D hidden.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama, mixtral, olmo2
from jaxpref.models.families.family import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoeArchitecture(mixtral.ExpertsArchitecture):
    """The architecture of an OLMoE model."""

    clip_qkv: float | None = at_least(1e-6, default=None)
    """The largest absolute value of queries, keys and values; None for no limit."""

    @property
    def family(self) -> Family:
        """OLMoE."""
        return FAMILY


class OlmoeBlock(mixtral.ExpertsBlock, olmo2.HeadsNormBlock):
    """Norms of queries and keys, and a mixture of experts.

    Source: Muennighoff et al. 2024, arXiv:2409.02060.
    """

    architecture: OlmoeArchitecture

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Normed queries and keys, and values, all of them clipped."""
        q, k, v = super().project(h)
        limit = self.architecture.clip_qkv
        if limit is None:
            return q, k, v
        q, k, v = (jnp.clip(x, -limit, limit) for x in (q, k, v))
        return q, k, v


class OlmoeTransformer(llama.LlamaTransformer):
    """OLMoE's modules."""

    block = OlmoeBlock


def read_config(fields: ConfigFields) -> OlmoeArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    fields.require("hidden_act", "silu")
    bias = fields.read("attention_bias", bool, False)
    clip = fields.get("clip_qkv")
    sizes = llama.read_sizes(fields, rms_norm_eps=1e-5, max_position_embeddings=4096)
    return OlmoeArchitecture(
        **sizes,
        projection_bias=bias,
        output_bias=bias,
        num_experts=fields.read("num_experts", int, 64),
        experts_per_token=fields.read("num_experts_per_tok", int, 8),
        normalized=fields.read("norm_topk_prob", bool, False),
        clip_qkv=None if clip is None else fields.read("clip_qkv", float),
    )


def write_config(architecture: OlmoeArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    return mixtral.write_sizes(architecture) | {
        "num_experts": architecture.num_experts,
        "norm_topk_prob": architecture.normalized,
        "clip_qkv": architecture.clip_qkv,
    }


FAMILY = Family(
    model_type="olmoe",
    causal_lm="OlmoeForCausalLM",
    classifier="OlmoeForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=OlmoeTransformer,
    tensors=mixtral.tensors("mlp", "gate_proj", "up_proj", "down_proj")
    | olmo2.QK_NORMS,
    harmless=mixtral.EXPERT_FIELDS,
)
"""OLMoE; `transformers` has no sequence classifier of it."""
