"""Gemma 2: Gemma with four norms per layer, soft caps and alternating windows.

Source: Gemma Team 2024, arXiv:2408.00118.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import gemma, llama
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.window import (
    layer_types,
    read_layer_types,
    read_window,
    window_of,
)
from jaxpref.models.layout import SPECS
from jaxpref.models.numerics import Numerics
from jaxpref.models.transformer import Attend, Rngs, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Architecture(gemma.GemmaArchitecture):
    """The architecture of a Gemma 2 model."""

    query_pre_attn_scalar: float = at_least(1e-6, default=256)
    """Attention scores are divided by the square root of this."""

    @property
    def family(self) -> Family:
        """Gemma 2."""
        return FAMILY


class Gemma2Block(gemma.GemmaBlock):
    """Gemma's block with a norm before and after attention and the MLP."""

    architecture: Gemma2Architecture

    def __init__(
        self, architecture: llama.LlamaArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        shape = (architecture.num_layers, architecture.hidden_size)
        self.attention_post_norm = zeros(numerics, shape, SPECS.layer_norm)
        self.mlp_post_norm = zeros(numerics, shape, SPECS.layer_norm)

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Scaled queries [B, T, H, K], keys and values [B, T, G, K]."""
        q, k, v = super().project(h)
        return q * self.query_factor(), k, v

    def query_factor(self) -> float:
        """What makes the scale of scores 1/sqrt(query_pre_attn_scalar)."""
        a = self.architecture
        return (a.head_dim / a.query_pre_attn_scalar) ** 0.5

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer."""
        h = self.norm(x, self.attention_norm[...])
        attended, state = self.attend(h, shared, attributes, attend)
        out = self.combine_heads(attended)
        x = x + self.norm(out, self.attention_post_norm[...])
        out = self.mlp(self.norm(x, self.mlp_norm[...]))
        return x + self.norm(out, self.mlp_post_norm[...]), state


class Gemma2Transformer(gemma.GemmaTransformer):
    """Gemma 2's modules."""

    block = Gemma2Block


def read_caps(
    fields: ConfigFields, attention: float | None, logits: float | None
) -> dict[str, Any]:
    """The soft caps and the scale of scores; null means no cap."""
    caps = {"attn_logit_softcapping": attention, "final_logit_softcapping": logits}
    for name, default in caps.items():
        if fields.values.get(name, default) is None:
            fields.get(name)
            caps[name] = None
        else:
            caps[name] = fields.read(name, float, default)
    return dict(
        attention_soft_cap=caps["attn_logit_softcapping"],
        logit_soft_cap=caps["final_logit_softcapping"],
        query_pre_attn_scalar=fields.read("query_pre_attn_scalar", float, 256.0),
    )


def write_caps(architecture: Gemma2Architecture) -> dict[str, Any]:
    """The fields that `read_caps` reads."""
    scalar = architecture.query_pre_attn_scalar
    return {
        "attn_logit_softcapping": architecture.attention_soft_cap,
        "final_logit_softcapping": architecture.logit_soft_cap,
        # An integer in transformers.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    }


def read_config(fields: ConfigFields) -> Gemma2Architecture:
    """See `Family`."""
    sizes = gemma.read_sizes(fields, num_kv_heads=4, max_position_embeddings=8192)
    alternating = [n % 2 == 0 for n in range(sizes["num_layers"])]
    layers = read_layer_types(fields, alternating)
    windows = window_of(read_window(fields, 4096), layers)
    return Gemma2Architecture(**sizes, **windows, **read_caps(fields, 50.0, 30.0))


def write_config(architecture: Gemma2Architecture) -> dict[str, Any]:
    """See `Family`."""
    return (
        gemma.write_config(architecture)
        | write_caps(architecture)
        | {
            "sliding_window": architecture.sliding_window,
            "layer_types": layer_types(architecture),
        }
    )


NORMS = {
    f"layers.{ours}_norm": TensorName(f"model.layers.{{}}.{theirs}_layernorm.weight")
    for ours, theirs in {
        "attention_post": "post_attention",
        "mlp": "pre_feedforward",
        "mlp_post": "post_feedforward",
    }.items()
}

FAMILY = dataclasses.replace(
    gemma.FAMILY,
    model_type="gemma2",
    causal_lm="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=Gemma2Transformer,
    tensors=llama.TENSORS | NORMS,
    harmless=("cache_implementation",),
)
