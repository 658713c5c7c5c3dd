"""GPT-2: LayerNorm, biases, learned positions, and an MLP without a gate.

Axes: B rows, T tokens, D hidden, H heads, K head features, F feed-forward features,
L layers.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError
from jaxpref.models.architecture import MOST_WEIGHTS, Architecture, at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families.activations import ACTIVATIONS, read_activation
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.models.linear import dense_einsum
from jaxpref.models.numerics import Numerics
from jaxpref.models.transformer import (
    Attend,
    Block,
    Rngs,
    Transformer,
    add_bias,
    layer_norm,
    normal,
    ones,
    zeros,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormArchitecture(Architecture):
    """What GPT-2 and GPT-NeoX have in common."""

    layer_norm_eps: float = at_least(0, default=1e-5)
    activation: str = "gelu_new"
    attention_bias: bool = True
    """Whether the projections of attention have biases."""

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"architecture: activation is {self.activation!r}; supported: "
                f"{', '.join(ACTIVATIONS)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Architecture(LayerNormArchitecture):
    """The architecture of a GPT-2 model."""

    tie_word_embeddings: bool = True
    scale_attention: bool = True
    """Whether scores are divided by sqrt(K)."""
    scale_attention_by_layer: bool = False
    """Whether the scores of layer i = 0, 1, ... are also divided by i + 1."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_position_embeddings * self.hidden_size > MOST_WEIGHTS:
            raise InputError(
                f"architecture: max_position_embeddings={self.max_position_embeddings} "
                f"with hidden_size={self.hidden_size} is too large; check both"
            )

    @property
    def family(self) -> Family:
        """GPT-2."""
        return FAMILY


class LayerNormBlock(Block):
    """Attention and an MLP with biases, each on a normed residual stream."""

    architecture: LayerNormArchitecture

    def __init__(
        self, architecture: LayerNormArchitecture, numerics: Numerics, rngs: Rngs
    ):
        a, L, D = architecture, architecture.num_layers, architecture.hidden_size
        H, K, F = a.num_heads, a.head_dim, a.intermediate_size
        small = (2 * L) ** -0.5  # as in Llama's block
        drawn = lambda *args: normal(rngs, a, numerics, *args)
        none = lambda shape, spec: zeros(numerics, shape, spec)
        self.architecture = architecture
        self.attention_norm = ones(numerics, (L, D), SPECS.layer_norm)
        self.attention_norm_bias = none((L, D), SPECS.layer_norm)
        self.query = drawn((L, D, H, K), SPECS.attention_in)
        self.key = drawn((L, D, H, K), SPECS.attention_in)
        self.value = drawn((L, D, H, K), SPECS.attention_in)
        self.output = drawn((L, H, K, D), SPECS.attention_out, small)
        if a.attention_bias:
            self.query_bias = none((L, H, K), SPECS.head_bias)
            self.key_bias = none((L, H, K), SPECS.head_bias)
            self.value_bias = none((L, H, K), SPECS.head_bias)
            self.output_bias = none((L, D), SPECS.layer_norm)
        self.mlp_norm = ones(numerics, (L, D), SPECS.layer_norm)
        self.mlp_norm_bias = none((L, D), SPECS.layer_norm)
        self.up = drawn((L, D, F), SPECS.mlp_in)
        self.up_bias = none((L, F), SPECS.mlp_bias)
        self.down = drawn((L, F, D), SPECS.mlp_out, small)
        self.down_bias = none((L, D), SPECS.layer_norm)

    def rotate(self, q: jax.Array, k: jax.Array, shared: Any) -> tuple[Any, Any]:
        """Queries and keys with their positions; here they have none."""
        return q, k

    def attention(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The output of attention, and the state that `attend` returned."""
        eps, bias = self.architecture.layer_norm_eps, self.architecture.attention_bias
        h = layer_norm(x, self.attention_norm[...], self.attention_norm_bias[...], eps)
        q, k, v = (
            dense_einsum("btd,dhk->bthk", h, w[...], spec=SPECS.heads)
            for w in (self.query, self.key, self.value)
        )
        if bias:
            q = add_bias(q, self.query_bias)
            k, v = add_bias(k, self.key_bias), add_bias(v, self.value_bias)
        q, k = self.rotate(q, k, shared)
        if attributes is not None:
            q = q * attributes.astype(q.dtype)
        attended, state = attend(q, k, v)
        out = self.output[...]
        out = dense_einsum("bthk,hkd->btd", attended, out, spec=SPECS.hidden)
        return add_bias(out, self.output_bias) if bias else out, state

    def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """down(activation(up(h))), with biases."""
        a = self.architecture
        h = layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], a.layer_norm_eps)
        h = dense_einsum("btd,df->btf", h, self.up[...], spec=SPECS.features)
        h = ACTIVATIONS[a.activation](add_bias(h, self.up_bias))
        h = dense_einsum("btf,fd->btd", h, self.down[...], spec=SPECS.hidden)
        return add_bias(h, self.down_bias)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; `attributes` is the factor of the queries, or None."""
        attended, state = self.attention(x, shared, attributes, attend)
        x = x + attended
        return x + self.mlp(x), state


class LayerNormTransformer(Transformer):
    """The modules that GPT-2 and GPT-NeoX have in common."""

    block: ClassVar[type[Block]] = LayerNormBlock
    architecture: LayerNormArchitecture

    def __init__(
        self, architecture: LayerNormArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        self.norm = ones(numerics, (architecture.hidden_size,), SPECS.norm)
        self.norm_bias = zeros(numerics, (architecture.hidden_size,), SPECS.norm)

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """LayerNorm."""
        eps = self.architecture.layer_norm_eps
        return layer_norm(x, self.norm[...], self.norm_bias[...], eps)


class GPT2Transformer(LayerNormTransformer):
    """GPT-2's modules."""

    first_position: ClassVar[int] = 0
    """The row of position 0 in the table of positions."""
    architecture: GPT2Architecture

    def __init__(self, architecture: GPT2Architecture, numerics: Numerics, rngs: Rngs):
        super().__init__(architecture, numerics, rngs)
        rows = self.first_position + architecture.max_position_embeddings
        shape = (rows, architecture.hidden_size)
        table = SPECS.embed_gathered  # too small to shard over fsdp
        self.positions = normal(rngs, architecture, numerics, shape, table)

    def embed_tokens(
        self,
        table: Float[Array, "*N V D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Embeddings of tokens and positions; padding may be beyond the last position.

        Source: Radford et al. 2019, "Language Models are Unsupervised Multitask
        Learners", section 2.3.
        """
        x = super().embed_tokens(table, tokens, positions)
        learned = self.positions[...].astype(x.dtype)
        shared = positions.shape[0] == 1  # by all rows
        found, used = (
            (P(None, None, "tensor"), P(None, None, None))
            if shared
            else (SPECS.features, SPECS.hidden)
        )
        rows = positions + self.first_position
        learned = learned.at[rows].get(mode="clip", out_sharding=on_mesh(found))
        return x + reshard(learned, used)

    def shared_inputs(self, positions: Int[Array, "B T"]) -> None:
        """Nothing: positions are part of the embedding."""

    def layer_attributes(self) -> Float[Array, " L"] | None:
        """The factors of the queries, if they differ from 1."""
        a = self.architecture
        if a.scale_attention and not a.scale_attention_by_layer:
            return None
        factors = jnp.full(a.num_layers, 1.0 if a.scale_attention else a.head_dim**0.5)
        return factors / jnp.arange(1, a.num_layers + 1) ** a.scale_attention_by_layer


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "layer_norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
    "max_position_embeddings": "n_positions",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "scale_attention": "scale_attn_weights",
    "scale_attention_by_layer": "scale_attn_by_inverse_layer_idx",
}
"""Fields of the architecture, and their names in config.json."""


def read_config(fields: ConfigFields) -> GPT2Architecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    hidden_size, heads = fields.read("n_embd", int), fields.read("n_head", int)
    if heads < 1 or hidden_size % heads:
        raise InputError(
            f"{fields.source}: field n_head is {heads}, which does not divide n_embd="
            f"{hidden_size}; check both"
        )
    return GPT2Architecture(
        vocab_size=fields.read("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.read("n_inner", int, 4 * hidden_size),
        num_layers=fields.read("n_layer", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=fields.read("n_positions", int, 1024),
        tie_word_embeddings=fields.read("tie_word_embeddings", bool, True),
        initializer_range=fields.read("initializer_range", float, 0.02),
        layer_norm_eps=fields.read("layer_norm_epsilon", float, 1e-5),
        activation=read_activation(fields, "activation_function", "gelu_new"),
        scale_attention=fields.read("scale_attn_weights", bool, True),
        scale_attention_by_layer=fields.read(
            "scale_attn_by_inverse_layer_idx", bool, False
        ),
    )


def write_config(architecture: GPT2Architecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    return {theirs: getattr(architecture, ours) for ours, theirs in SIZES.items()}


def _layer(name: str, *args: Any, **options: Any) -> TensorName:
    return TensorName(f"transformer.h.{{}}.{name}", *args, **options)


def _attention(ending: str, inputs: int) -> dict[str, TensorName]:
    # One tensor holds queries, keys and values.
    paths = tuple(f"layers.{x}{ending}" for x in ("query", "key", "value"))
    name = f"attn.c_attn.{'bias' if ending else 'weight'}"
    tensor = _layer(name, inputs, input_major=True, parts=paths)
    return dict.fromkeys(paths, tensor)


TENSORS = {
    "embed": TensorName("transformer.wte.weight"),
    "positions": TensorName("transformer.wpe.weight"),
    "layers.attention_norm": _layer("ln_1.weight"),
    "layers.attention_norm_bias": _layer("ln_1.bias"),
    **_attention("", 1),
    **_attention("_bias", 0),
    "layers.output": _layer("attn.c_proj.weight", 2, input_major=True),
    "layers.output_bias": _layer("attn.c_proj.bias"),
    "layers.mlp_norm": _layer("ln_2.weight"),
    "layers.mlp_norm_bias": _layer("ln_2.bias"),
    "layers.up": _layer("mlp.c_fc.weight", 1, input_major=True),
    "layers.up_bias": _layer("mlp.c_fc.bias"),
    "layers.down": _layer("mlp.c_proj.weight", 1, input_major=True),
    "layers.down_bias": _layer("mlp.c_proj.bias"),
    "norm": TensorName("transformer.ln_f.weight"),
    "norm_bias": TensorName("transformer.ln_f.bias"),
    "head": TensorName("lm_head.weight", 1),
    "score": TensorName("score.weight", 1),
}


def rename(name: str) -> str:
    """Folders of the backbone alone have no prefix."""
    if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
        return f"transformer.{name}"
    return name


FAMILY = Family(
    model_type="gpt2",
    causal_lm="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=GPT2Transformer,
    tensors=TENSORS,
    harmless=(
        "n_ctx",  # equal to n_positions, and not read
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "predict_special_tokens",
        "reorder_and_upcast_attn",  # scores are in float32 anyway
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ),
    # Masks, which old versions stored.
    ignored_tensors=(".attn.bias", ".attn.masked_bias"),
    rename=rename,
)
"""GPT-2."""
