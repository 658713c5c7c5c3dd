"""Llama, and models with the same architecture (SmolLM2, TinyLlama, ...).

Axes: B rows, T tokens, D hidden, H query heads, G key-value heads, K head features,
F feed-forward features, L layers.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture, at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.rope import read_rope, write_rope
from jaxpref.models.layout import SPECS
from jaxpref.models.linear import dense_einsum
from jaxpref.models.numerics import Numerics
from jaxpref.models.rotary import (
    RopeScaling,
    inverse_frequencies,
    rotary_angles,
    rotate,
)
from jaxpref.models.transformer import (
    Attend,
    Block,
    Rngs,
    Transformer,
    normal,
    ones,
    rms_norm,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaArchitecture(Architecture):
    """The architecture of a Llama model."""

    rms_norm_eps: float = at_least(0, default=1e-5)
    rope_theta: float = at_least(1, default=10000.0)
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim % 2:
            raise InputError(
                f"architecture: head_dim={self.head_dim} is odd; rotary positions need "
                "an even head_dim"
            )

    @property
    def family(self) -> Family:
        """Llama."""
        return FAMILY


QueriesKeysValues = tuple[
    Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]
]


class LlamaBlock(Block):
    """Attention and a gated MLP, each on a normed residual stream."""

    architecture: LlamaArchitecture

    def __init__(self, architecture: LlamaArchitecture, numerics: Numerics, rngs: Rngs):
        a, L, D = architecture, architecture.num_layers, architecture.hidden_size
        H, G, K, F = a.num_heads, a.num_kv_heads, a.head_dim, a.intermediate_size
        # Weights that write to the residual stream start smaller, so that its norm does
        # not grow with depth.
        small = (2 * L) ** -0.5
        drawn = lambda *args: normal(rngs, a, numerics, *args)
        self.architecture = architecture
        self.attention_norm = ones(numerics, (L, D), SPECS.layer_norm)
        self.query = drawn((L, D, H, K), SPECS.attention_in)
        self.key = drawn((L, D, G, K), SPECS.attention_in)
        self.value = drawn((L, D, G, K), SPECS.attention_in)
        self.output = drawn((L, H, K, D), SPECS.attention_out, small)
        self.mlp_norm = ones(numerics, (L, D), SPECS.layer_norm)
        self.gate = drawn((L, D, F), SPECS.mlp_in)
        self.up = drawn((L, D, F), SPECS.mlp_in)
        self.down = drawn((L, F, D), SPECS.mlp_out, small)

    def project(self, h: Float[Array, "B T D"]) -> QueriesKeysValues:
        """Queries [B, T, H, K], keys and values [B, T, G, K], not yet rotated."""
        q, k, v = (
            dense_einsum("btd,dhk->bthk", h, w[...], spec=SPECS.heads)
            for w in (self.query, self.key, self.value)
        )
        return q, k, v

    def add_attention(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T H K"]
    ) -> Float[Array, "B T D"]:
        """Adds the output projection of the attention's result."""
        output = self.output[...]
        return x + dense_einsum("bthk,hkd->btd", attended, output, spec=SPECS.hidden)

    def add_mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Adds down(silu(gate(h)) * up(h)): SwiGLU, Shazeer 2020, arXiv:2002.05202."""
        h = rms_norm(x, self.mlp_norm[...], self.architecture.rms_norm_eps)
        gate = dense_einsum("btd,df->btf", h, self.gate[...], spec=SPECS.features)
        up = dense_einsum("btd,df->btf", h, self.up[...], spec=SPECS.features)
        h = jax.nn.silu(gate) * up
        return x + dense_einsum("btf,fd->btd", h, self.down[...], spec=SPECS.hidden)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; `shared` are the cosines and sines of the positions' angles."""
        h = rms_norm(x, self.attention_norm[...], self.architecture.rms_norm_eps)
        q, k, v = self.project(h)
        attended, state = attend(rotate(q, *shared), rotate(k, *shared), v)
        return self.add_mlp(self.add_attention(x, attended)), state


class LlamaTransformer(Transformer):
    """Llama's modules; subclasses may use another block."""

    block: ClassVar[type[Block]] = LlamaBlock
    architecture: LlamaArchitecture

    def __init__(self, architecture: LlamaArchitecture, numerics: Numerics, rngs: Rngs):
        super().__init__(architecture, numerics, rngs)
        self.norm = ones(numerics, (architecture.hidden_size,), SPECS.norm)

    def shared_inputs(self, positions: Int[Array, "B T"]) -> tuple[jax.Array, ...]:
        """Cosines and sines [B, T, 1, K/2] of the positions' angles."""
        a = self.architecture
        frequencies = inverse_frequencies(a.head_dim, a.rope_theta, a.rope_scaling)
        return rotary_angles(frequencies, positions, self.numerics.compute_dtype)

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """RMSNorm."""
        return rms_norm(x, self.norm[...], self.architecture.rms_norm_eps)


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
"""Fields of the architecture, and their names in config.json."""
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Fields of config.json with the only supported value."""


def read_sizes(fields: ConfigFields) -> dict[str, Any]:
    """The arguments of `LlamaArchitecture`, with the defaults of `transformers`."""
    hidden_size = fields.read("hidden_size", int)
    heads = fields.read("num_attention_heads", int)
    context = fields.read("max_position_embeddings", int, 2048)
    theta, scaling = read_rope(fields, context)
    return dict(
        vocab_size=fields.read("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.read("intermediate_size", int),
        num_layers=fields.read("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=fields.read("num_key_value_heads", int, heads),
        head_dim=fields.read("head_dim", int, hidden_size // max(heads, 1)),
        rms_norm_eps=fields.read("rms_norm_eps", float, 1e-6),
        max_position_embeddings=context,
        tie_word_embeddings=fields.read("tie_word_embeddings", bool, False),
        initializer_range=fields.read("initializer_range", float, 0.02),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def read_config(fields: ConfigFields) -> LlamaArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    for name, supported in FIXED.items():
        fields.require(name, supported)
    return LlamaArchitecture(**read_sizes(fields))


def write_config(architecture: LlamaArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    sizes = {theirs: getattr(architecture, ours) for ours, theirs in SIZES.items()}
    rope = write_rope(architecture.rope_theta, architecture.rope_scaling)
    return FIXED | sizes | rope


TENSORS = {
    "embed": TensorName("model.embed_tokens.weight"),
    "layers.attention_norm": TensorName("model.layers.{}.input_layernorm.weight"),
    "layers.query": TensorName("model.layers.{}.self_attn.q_proj.weight", 1),
    "layers.key": TensorName("model.layers.{}.self_attn.k_proj.weight", 1),
    "layers.value": TensorName("model.layers.{}.self_attn.v_proj.weight", 1),
    "layers.output": TensorName("model.layers.{}.self_attn.o_proj.weight", 2),
    "layers.mlp_norm": TensorName("model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate": TensorName("model.layers.{}.mlp.gate_proj.weight", 1),
    "layers.up": TensorName("model.layers.{}.mlp.up_proj.weight", 1),
    "layers.down": TensorName("model.layers.{}.mlp.down_proj.weight", 1),
    "norm": TensorName("model.norm.weight"),
    "head": TensorName("lm_head.weight", 1),
    "score": TensorName("score.weight", 1),
}

FAMILY = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=LlamaTransformer,
    tensors=TENSORS,
    harmless=("is_llama_config",),
)
