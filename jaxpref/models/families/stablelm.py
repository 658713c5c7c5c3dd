"""StableLM: Llama with LayerNorm and partly rotated heads.

Axes: B rows, T tokens, D hidden, H query heads, G key-value heads, K head features,
L layers.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.rope import read_rope
from jaxpref.models.layout import SPECS
from jaxpref.models.numerics import Numerics
from jaxpref.models.transformer import Attend, Rngs, layer_norm, ones, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableLmArchitecture(llama.LlamaArchitecture):
    """The architecture of a StableLM model; it has no RMSNorm."""

    partial_rotary_factor: float = at_least(0, default=0.25)
    layer_norm_eps: float = at_least(0, default=1e-5)
    query_key_norm: bool = False
    """Whether the query and the key of each head are normed."""
    parallel_residual: bool = False
    """Whether the MLP reads the input of attention, and has no norm of its own."""

    @property
    def family(self) -> Family:
        """StableLM."""
        return FAMILY


class StableLmBlock(llama.LlamaBlock):
    """Llama's block with LayerNorm."""

    architecture: StableLmArchitecture

    def __init__(
        self, architecture: StableLmArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        a, L = architecture, architecture.num_layers
        bias = lambda: zeros(numerics, (L, a.hidden_size), SPECS.layer_norm)
        self.attention_norm_bias = bias()
        if a.parallel_residual:
            del self.mlp_norm
        else:
            self.mlp_norm_bias = bias()
        if a.query_key_norm:
            gain = lambda n: ones(numerics, (L, n, a.head_dim), SPECS.head_bias)
            self.query_norm, self.key_norm = gain(a.num_heads), gain(a.num_kv_heads)

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Queries and keys, each head normed with its own gain, and values."""
        q, k, v = super().project(h)
        if self.architecture.query_key_norm:
            q = self._head_norm(q, self.query_norm[...])
            k = self._head_norm(k, self.key_norm[...])
        return q, k, v

    def _head_norm(
        self, x: Float[Array, "B T H K"], gain: Float[Array, "H K"]
    ) -> Float[Array, "B T H K"]:
        eps = self.architecture.layer_norm_eps
        return layer_norm(x, gain, jnp.zeros_like(gain), eps)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; `shared` are the cosines and sines of the positions' angles."""
        a = self.architecture
        gain, bias = self.attention_norm[...], self.attention_norm_bias[...]
        h = layer_norm(x, gain, bias, a.layer_norm_eps)
        attended, state = self.attend(h, shared, attributes, attend)
        x = x + self.combine_heads(attended)
        if not a.parallel_residual:
            gain, bias = self.mlp_norm[...], self.mlp_norm_bias[...]
            h = layer_norm(x, gain, bias, a.layer_norm_eps)
        return x + self.mlp(h), state


class StableLmTransformer(llama.LlamaTransformer):
    """StableLM's modules."""

    block = StableLmBlock
    architecture: StableLmArchitecture

    def __init__(
        self, architecture: StableLmArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        self.norm_bias = zeros(numerics, (architecture.hidden_size,), SPECS.norm)

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """LayerNorm."""
        eps = self.architecture.layer_norm_eps
        return layer_norm(x, self.norm[...], self.norm_bias[...], eps)


FLAGS = {
    "projection_bias": "use_qkv_bias",
    "query_key_norm": "qk_layernorm",
    "parallel_residual": "use_parallel_residual",
}
"""Switches of the architecture, and their names in config.json."""


def read_config(fields: ConfigFields) -> StableLmArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    fields.require("hidden_act", "silu")
    hidden_size = fields.read("hidden_size", int)
    heads = fields.read("num_attention_heads", int)
    if heads < 1 or hidden_size % heads:
        raise InputError(
            f"{fields.source}: field num_attention_heads is {heads}, which does not "
            f"divide hidden_size={hidden_size}; check both"
        )
    fields.require("head_dim", hidden_size // heads)
    context = fields.read("max_position_embeddings", int, 4096)
    rope = read_rope(fields, context, share=0.25)
    return StableLmArchitecture(
        vocab_size=fields.read("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.read("intermediate_size", int),
        num_layers=fields.read("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=fields.read("num_key_value_heads", int, 32),
        head_dim=hidden_size // heads,
        max_position_embeddings=context,
        tie_word_embeddings=fields.read("tie_word_embeddings", bool, False),
        initializer_range=fields.read("initializer_range", float, 0.02),
        layer_norm_eps=fields.read("layer_norm_eps", float, 1e-5),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        partial_rotary_factor=rope.share,
        **{ours: fields.read(theirs, bool, False) for ours, theirs in FLAGS.items()},
    )


def write_config(architecture: StableLmArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    a, fields = architecture, llama.write_config(architecture)
    for name in ("attention_bias", "mlp_bias", "head_dim", "rms_norm_eps"):
        del fields[name]
    flags = {theirs: getattr(a, ours) for ours, theirs in FLAGS.items()}
    numbers = {
        "layer_norm_eps": a.layer_norm_eps,
        "partial_rotary_factor": a.partial_rotary_factor,
    }
    return fields | flags | numbers


def _layer(name: str) -> TensorName:
    return TensorName(f"model.layers.{{}}.{name}")


FAMILY = Family(
    model_type="stablelm",
    causal_lm="StableLmForCausalLM",
    classifier="StableLmForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=StableLmTransformer,
    tensors=llama.TENSORS
    | {
        "layers.attention_norm_bias": _layer("input_layernorm.bias"),
        "layers.mlp_norm_bias": _layer("post_attention_layernorm.bias"),
        # Each head has a tensor of its own.
        "layers.query_norm": _layer("self_attn.q_layernorm.norms.{}.weight"),
        "layers.key_norm": _layer("self_attn.k_layernorm.norms.{}.weight"),
        "norm_bias": TensorName("model.norm.bias"),
    },
)
"""StableLM 3B, StableLM Zephyr, and StableLM 2."""
