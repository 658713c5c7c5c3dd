"""Llama, and models with the same architecture (SmolLM2, TinyLlama, ...).

Most other families are Llama with a few changes: subclasses of `LlamaBlock` that
override its methods.

Axes: B rows, T tokens, D hidden, H query heads, G key-value heads, K head features,
F feed-forward features, L layers.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError
from jaxpref.models.architecture import MOST, Architecture, at_least
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
    add_bias,
    normal,
    ones,
    rms_norm,
    zeros,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaArchitecture(Architecture):
    """The architecture of a Llama model."""

    rms_norm_eps: float = at_least(0, default=1e-5)
    rope_theta: float = at_least(1, default=10000.0)
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = at_least(0, default=1.0)
    """The share of a head's features that is rotated."""
    projection_bias: bool = False
    """Whether queries, keys and values have a bias."""
    output_bias: bool = False
    """Whether the output projection of attention has one."""
    mlp_bias: bool = False
    """Whether the matrices of the MLP have one."""

    def __post_init__(self):
        super().__post_init__()
        if self.rotary_features % 2:
            raise InputError(
                f"architecture: head_dim={self.head_dim} with partial_rotary_factor="
                f"{self.partial_rotary_factor:g} has {self.rotary_features} rotated "
                "features; their number must be even"
            )

    @property
    def family(self) -> Family:
        """Llama."""
        return FAMILY

    @property
    def context_length(self) -> int:
        """See `Architecture`; some scalings of rotary positions have a limit."""
        longest = self.rope_scaling.longest if self.rope_scaling else None
        return min(self.max_position_embeddings, longest or MOST)

    @property
    def rotary_features(self) -> int:
        """Number of features of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


QueriesKeysValues = tuple[
    Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]
]


class LlamaBlock(Block):
    """Attention and a gated MLP, each on a normed residual stream."""

    architecture: LlamaArchitecture
    activation = staticmethod(jax.nn.silu)

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
        if a.projection_bias:
            self.query_bias = zeros(numerics, (L, H, K), SPECS.head_bias)
            self.key_bias = zeros(numerics, (L, G, K), SPECS.head_bias)
            self.value_bias = zeros(numerics, (L, G, K), SPECS.head_bias)
        if a.output_bias:
            self.output_bias = zeros(numerics, (L, D), SPECS.layer_norm)
        if a.mlp_bias:
            self.gate_bias = zeros(numerics, (L, F), SPECS.mlp_bias)
            self.up_bias = zeros(numerics, (L, F), SPECS.mlp_bias)
            self.down_bias = zeros(numerics, (L, D), SPECS.layer_norm)

    def norm(
        self, x: Float[Array, "*axes D"], gain: Float[Array, " D"]
    ) -> Float[Array, "*axes D"]:
        """RMSNorm."""
        return rms_norm(x, gain, self.architecture.rms_norm_eps)

    def project(self, h: Float[Array, "B T D"]) -> QueriesKeysValues:
        """Queries [B, T, H, K], keys and values [B, T, G, K], not yet rotated."""
        q, k, v = (
            dense_einsum("btd,dhk->bthk", h, w[...], spec=SPECS.heads)
            for w in (self.query, self.key, self.value)
        )
        if self.architecture.projection_bias:
            q = add_bias(q, self.query_bias)
            k, v = add_bias(k, self.key_bias), add_bias(v, self.value_bias)
        return q, k, v

    def attend(
        self, h: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T H K"], Any]:
        """Attention's result, before the output projection, and its state."""
        q, k, v = self.project(h)
        q, k = rotate(q, *shared), rotate(k, *shared)
        return attend(q, k, v, attributes.get("sliding", True))

    def combine_heads(self, attended: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """The output projection of attention."""
        output = self.output[...]
        out = dense_einsum("bthk,hkd->btd", attended, output, spec=SPECS.hidden)
        return add_bias(out, self.output_bias) if self.architecture.output_bias else out

    def mlp(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """down(act(gate(h)) * up(h)): SwiGLU, Shazeer 2020, arXiv:2002.05202."""
        gate = dense_einsum("btd,df->btf", h, self.gate[...], spec=SPECS.features)
        up = dense_einsum("btd,df->btf", h, self.up[...], spec=SPECS.features)
        has_bias = self.architecture.mlp_bias
        if has_bias:
            gate, up = add_bias(gate, self.gate_bias), add_bias(up, self.up_bias)
        h = self.activation(gate) * up
        out = dense_einsum("btf,fd->btd", h, self.down[...], spec=SPECS.hidden)
        return add_bias(out, self.down_bias) if has_bias else out

    def attention(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The first half of a layer: the residual stream, and attention's state."""
        h = self.norm(x, self.attention_norm[...])
        attended, state = self.attend(h, shared, attributes, attend)
        return x + self.combine_heads(attended), state

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; `shared` are the cosines and sines of the positions' angles."""
        x, state = self.attention(x, shared, attributes, attend)
        return x + self.mlp(self.norm(x, self.mlp_norm[...])), state


class LlamaTransformer(Transformer):
    """Llama's modules; subclasses may use another block."""

    block: ClassVar[type[Block]] = LlamaBlock
    architecture: LlamaArchitecture

    def __init__(self, architecture: LlamaArchitecture, numerics: Numerics, rngs: Rngs):
        super().__init__(architecture, numerics, rngs)
        self.norm = ones(numerics, (architecture.hidden_size,), SPECS.norm)

    def shared_inputs(self, positions: Int[Array, "B T"]) -> Any:
        """Cosines and sines [B, T, 1, R/2] of the positions' angles."""
        a = self.architecture
        return self.angles(positions, a.rope_theta, a.rope_scaling)

    def angles(
        self, positions: Int[Array, "B T"], theta: float, scaling: RopeScaling | None
    ) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, T, 1, R/2] of the angles with a rotary base."""
        frequencies = inverse_frequencies(
            self.architecture.rotary_features, theta, scaling
        )
        scale = scaling.attention_scale if scaling else 1.0
        dtype = self.numerics.compute_dtype
        return rotary_angles(frequencies, positions, dtype, scale)

    def layer_attributes(self) -> dict[str, jax.Array]:
        """Whether each layer has sliding attention, if layers differ."""
        layers = self.architecture.sliding_layers
        return {} if layers is None else {"sliding": jnp.array(layers)}

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm of the layers."""
        layers: Any = self.layers
        return layers.norm(x, self.norm[...])


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
FIXED = {"hidden_act": "silu"}
"""Fields of config.json with the only supported value."""


def read_sizes(
    fields: ConfigFields,
    *,
    theta: float = 10000.0,
    partial_rotary: bool = False,
    **defaults: Any,
) -> dict[str, Any]:
    """The arguments of `LlamaArchitecture`.

    Args:
        fields: the fields of a config.json.
        theta: the default of the rotary base.
        partial_rotary: whether the family allows a share of rotated features.
        defaults: values of missing fields, where they differ from Llama's in
            `transformers`.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    hidden_size = fields.read("hidden_size", int)
    heads = fields.read("num_attention_heads", int)
    standard = dict(
        num_kv_heads=heads,
        head_dim=hidden_size // max(heads, 1),
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )
    read = {"hidden_size": hidden_size, "num_heads": heads}
    for ours, default in (standard | defaults).items():
        read[ours] = fields.read(SIZES[ours], type(default), default)
    for ours in ("vocab_size", "intermediate_size", "num_layers"):
        read[ours] = fields.read(SIZES[ours], int)
    rope = read_rope(fields, read["max_position_embeddings"], theta=theta)
    if rope.share != 1 and not partial_rotary:
        raise InputError(
            f"{fields.source}: field partial_rotary_factor is {rope.share}; this "
            "family rotates all features, use a model that does"
        )
    return read | dict(
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        partial_rotary_factor=rope.share,
    )


def read_config(fields: ConfigFields) -> LlamaArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    for name, supported in FIXED.items():
        fields.require(name, supported)
    return LlamaArchitecture(**read_sizes(fields), **read_biases(fields))


def read_biases(fields: ConfigFields) -> dict[str, Any]:
    """The biases by `attention_bias` and `mlp_bias`."""
    attention = fields.read("attention_bias", bool, False)
    mlp = fields.read("mlp_bias", bool, False)
    return dict(projection_bias=attention, output_bias=attention, mlp_bias=mlp)


def write_config(architecture: LlamaArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    sizes = {theirs: getattr(architecture, ours) for ours, theirs in SIZES.items()}
    rope = write_rope(architecture.rope_theta, architecture.rope_scaling)
    biases = {
        "attention_bias": architecture.output_bias,
        "mlp_bias": architecture.mlp_bias,
    }
    return FIXED | sizes | rope | biases


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
    **{
        f"layers.{ours}_bias": TensorName(f"model.layers.{{}}.{theirs}.bias", 0)
        for ours, theirs in {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "output": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }.items()
    },
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
