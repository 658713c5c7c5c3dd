"""Qwen3: Llama with normalized queries and keys."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.qwen2 import read_windows, write_windows
from jaxpref.models.layout import SPECS
from jaxpref.models.numerics import Numerics
from jaxpref.models.transformer import Rngs, ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Architecture(llama.LlamaArchitecture):
    """The architecture of a Qwen3 model."""

    @property
    def family(self) -> Family:
        """Qwen3."""
        return FAMILY


class Qwen3Block(llama.LlamaBlock):
    """Llama's block with an RMSNorm of each head's query and key."""

    def __init__(
        self, architecture: llama.LlamaArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        shape = (architecture.num_layers, architecture.head_dim)
        self.query_norm = ones(numerics, shape, SPECS.layer_norm)
        self.key_norm = ones(numerics, shape, SPECS.layer_norm)

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Normed queries [B, T, H, K] and keys, and values [B, T, G, K]."""
        q, k, v = super().project(h)
        q, k = self.norm(q, self.query_norm[...]), self.norm(k, self.key_norm[...])
        return q, k, v


class Qwen3Transformer(llama.LlamaTransformer):
    """Qwen3's modules."""

    block = Qwen3Block


def read_config(fields: ConfigFields) -> Qwen3Architecture:
    """See `Family`."""
    fields.require("hidden_act", "silu")
    sizes = llama.read_sizes(fields, head_dim=128, max_position_embeddings=32768)
    windows = read_windows(fields, sizes["num_layers"])
    bias = fields.read("attention_bias", bool, False)
    return Qwen3Architecture(**sizes, **windows, projection_bias=bias, output_bias=bias)


def write_config(architecture: Qwen3Architecture) -> dict[str, Any]:
    """See `Family`."""
    fields = llama.write_config(architecture)
    del fields["mlp_bias"]
    return fields | write_windows(architecture)


NORMS = {
    f"layers.{ours}_norm": TensorName(f"model.layers.{{}}.self_attn.{theirs}.weight")
    for ours, theirs in {"query": "q_norm", "key": "k_norm"}.items()
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=Qwen3Transformer,
    tensors=llama.TENSORS | NORMS,
    harmless=(),
)
