"""OLMo 2: norms after attention and MLP, and of the queries and keys of all heads.

Axes: B rows, T tokens, D hidden, H query heads, G key-value heads, K head features,
L layers.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.layout import SPECS
from jaxpref.models.numerics import Numerics
from jaxpref.models.rotary import rotate
from jaxpref.models.transformer import Attend, Rngs, ones, rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Architecture(llama.LlamaArchitecture):
    """The architecture of an OLMo 2 model."""

    @property
    def family(self) -> Family:
        """OLMo 2."""
        return FAMILY


class HeadsNormBlock(llama.LlamaBlock):
    """Llama's block, with RMSNorm of the queries and keys of all heads together."""

    def __init__(
        self, architecture: llama.LlamaArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        a, L = architecture, architecture.num_layers
        heads, groups = (L, a.num_heads, a.head_dim), (L, a.num_kv_heads, a.head_dim)
        self.query_norm = ones(numerics, heads, SPECS.head_bias)
        self.key_norm = ones(numerics, groups, SPECS.head_bias)

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Queries and keys, normed over all of their heads, and values."""
        q, k, v = super().project(h)
        q, k = self.norm(q, self.query_norm[...]), self.norm(k, self.key_norm[...])
        return q, k, v


class Olmo2Block(HeadsNormBlock):
    """Attention and a gated MLP, whose results are normed.

    Source: OLMo Team 2025, arXiv:2501.00656, section 3.
    """

    def norm(
        self, x: Float[Array, "*axes D"], gain: Float[Array, "*features D"]
    ) -> Float[Array, "*axes D"]:
        """RMSNorm, with the gain in float32 or wider too."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return rms_norm(wide, gain, self.architecture.rms_norm_eps).astype(x.dtype)

    def attend(
        self, h: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T H K"], Any]:
        """Attention's result; rotations are in the precision of the angles."""
        q, k, v = self.project(h)
        wide = shared[0].dtype
        q, k = (rotate(x.astype(wide), *shared).astype(x.dtype) for x in (q, k))
        return attend(q, k, v)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; `shared` are the cosines and sines of the positions' angles."""
        attended, state = self.attend(x, shared, attributes, attend)
        x = x + self.norm(self.combine_heads(attended), self.attention_norm[...])
        return x + self.norm(self.mlp(x), self.mlp_norm[...]), state


class Olmo2Transformer(llama.LlamaTransformer):
    """OLMo 2's modules."""

    block = Olmo2Block


def read_config(fields: ConfigFields) -> Olmo2Architecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    fields.require("hidden_act", "silu")
    bias = fields.read("attention_bias", bool, False)
    sizes = llama.read_sizes(fields, rms_norm_eps=1e-5)
    return Olmo2Architecture(**sizes, projection_bias=bias, output_bias=bias)


def write_config(architecture: llama.LlamaArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    fields = llama.write_config(architecture)
    del fields["mlp_bias"]
    return fields


QK_NORMS = {
    "layers.query_norm": TensorName("model.layers.{}.self_attn.q_norm.weight", 0),
    "layers.key_norm": TensorName("model.layers.{}.self_attn.k_norm.weight", 0),
}
"""The tensors of the norms of queries and keys."""
_LAYER = "model.layers.{}."

FAMILY = Family(
    model_type="olmo2",
    causal_lm="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=Olmo2Transformer,
    tensors=llama.TENSORS
    | QK_NORMS
    | {
        "layers.attention_norm": TensorName(f"{_LAYER}post_attention_layernorm.weight"),
        "layers.mlp_norm": TensorName(f"{_LAYER}post_feedforward_layernorm.weight"),
    },
)
"""OLMo 2."""
