"""GPT-NeoX (Pythia, ...): attention and MLP side by side, partly rotated heads.

Axes: B rows, T tokens, D hidden, H heads, K head features, R rotated features.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError
from jaxpref.models.architecture import MOST, at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import gpt2
from jaxpref.models.families.activations import read_activation
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.rope import read_rope, write_rope
from jaxpref.models.rotary import (
    RopeScaling,
    inverse_frequencies,
    rotary_angles,
    rotate,
)
from jaxpref.models.transformer import Attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXArchitecture(gpt2.LayerNormArchitecture):
    """The architecture of a GPT-NeoX model."""

    activation: str = "gelu"
    parallel_residual: bool = True
    """Whether the MLP reads the residual stream without the result of attention."""
    rope_theta: float = at_least(1, default=10000.0)
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = at_least(0, default=0.25)
    """The share of a head's features that is rotated."""

    def __post_init__(self):
        super().__post_init__()
        if self.rotary_features % 2 or not self.rotary_features:
            raise InputError(
                f"architecture: head_dim={self.head_dim} with partial_rotary_factor="
                f"{self.partial_rotary_factor:g} has {self.rotary_features} rotated "
                "features; their number must be even and positive"
            )

    @property
    def family(self) -> Family:
        """GPT-NeoX."""
        return FAMILY

    @property
    def context_length(self) -> int:
        """See `Architecture`; some scalings of rotary positions have a limit."""
        longest = self.rope_scaling.longest if self.rope_scaling else None
        return min(self.max_position_embeddings, longest or MOST)

    @property
    def rotary_features(self) -> int:
        """R, the number of features of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


class GPTNeoXBlock(gpt2.LayerNormBlock):
    """GPT-2's block, with rotated queries and keys, and parallel residuals."""

    architecture: GPTNeoXArchitecture

    def rotate(
        self, q: jax.Array, k: jax.Array, shared: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and keys, the first R features of each head rotated."""
        return rotate(q, *shared), rotate(k, *shared)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; `shared` are the cosines and sines of the positions' angles."""
        attended, state = self.attention(x, shared, attributes, attend)
        if self.architecture.parallel_residual:
            return x + attended + self.mlp(x), state
        x = x + attended
        return x + self.mlp(x), state


class GPTNeoXTransformer(gpt2.LayerNormTransformer):
    """GPT-NeoX's modules."""

    block = GPTNeoXBlock
    architecture: GPTNeoXArchitecture

    def shared_inputs(self, positions: Int[Array, "B T"]) -> tuple[jax.Array, ...]:
        """Cosines and sines [B, T, 1, R/2] of the positions' angles."""
        a, scaling = self.architecture, self.architecture.rope_scaling
        frequencies = inverse_frequencies(a.rotary_features, a.rope_theta, scaling)
        scale = scaling.attention_scale if scaling else 1.0
        dtype = self.numerics.compute_dtype
        return rotary_angles(frequencies, positions, dtype, scale)


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "attention_bias": "attention_bias",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "parallel_residual": "use_parallel_residual",
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}
"""Fields of the architecture, and their names in config.json."""


def read_config(fields: ConfigFields) -> GPTNeoXArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    hidden_size = fields.read("hidden_size", int)
    heads = fields.read("num_attention_heads", int)
    if heads < 1 or hidden_size % heads:
        raise InputError(
            f"{fields.source}: field num_attention_heads is {heads}, which does not "
            f"divide hidden_size={hidden_size}; check both"
        )
    context = fields.read("max_position_embeddings", int, 2048)
    rope = read_rope(_with_rope_names(fields), context, share=0.25)
    return GPTNeoXArchitecture(
        vocab_size=fields.read("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.read("intermediate_size", int),
        num_layers=fields.read("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=context,
        tie_word_embeddings=fields.read("tie_word_embeddings", bool, False),
        initializer_range=fields.read("initializer_range", float, 0.02),
        layer_norm_eps=fields.read("layer_norm_eps", float, 1e-5),
        activation=read_activation(fields, "hidden_act", "gelu"),
        attention_bias=fields.read("attention_bias", bool, True),
        parallel_residual=fields.read("use_parallel_residual", bool, True),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        partial_rotary_factor=rope.share,
    )


def _with_rope_names(fields: ConfigFields) -> ConfigFields:
    """The fields, those of rotary positions with the names of other families."""
    values = dict(fields.values)
    for theirs, usual in (
        ("rotary_emb_base", "rope_theta"),
        ("rotary_pct", "partial_rotary_factor"),
    ):
        value = fields.get(theirs)
        values[usual] = values.get(usual) if value is None else value
    return dataclasses.replace(fields, values=values)


def write_config(architecture: GPTNeoXArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    a = architecture
    fields = {theirs: getattr(a, ours) for ours, theirs in SIZES.items()}
    scaling = write_rope(a.rope_theta, a.rope_scaling)["rope_scaling"]
    return fields | {"rope_scaling": scaling}


def _layer(name: str, *args: Any, **options: Any) -> TensorName:
    return TensorName(f"gpt_neox.layers.{{}}.{name}", *args, **options)


def _attention(ending: str, inputs: int) -> dict[str, TensorName]:
    # One tensor holds the query, key and value of the first head, of the second, ...
    paths = tuple(f"layers.{x}{ending}" for x in ("query", "key", "value"))
    name = f"attention.query_key_value.{'bias' if ending else 'weight'}"
    return dict.fromkeys(paths, _layer(name, inputs, parts=paths, axis=1))


TENSORS = {
    "embed": TensorName("gpt_neox.embed_in.weight"),
    "layers.attention_norm": _layer("input_layernorm.weight"),
    "layers.attention_norm_bias": _layer("input_layernorm.bias"),
    **_attention("", 1),
    **_attention("_bias", 0),
    "layers.output": _layer("attention.dense.weight", 2),
    "layers.output_bias": _layer("attention.dense.bias"),
    "layers.mlp_norm": _layer("post_attention_layernorm.weight"),
    "layers.mlp_norm_bias": _layer("post_attention_layernorm.bias"),
    "layers.up": _layer("mlp.dense_h_to_4h.weight", 1),
    "layers.up_bias": _layer("mlp.dense_h_to_4h.bias"),
    "layers.down": _layer("mlp.dense_4h_to_h.weight", 1),
    "layers.down_bias": _layer("mlp.dense_4h_to_h.bias"),
    "norm": TensorName("gpt_neox.final_layer_norm.weight"),
    "norm_bias": TensorName("gpt_neox.final_layer_norm.bias"),
    "head": TensorName("embed_out.weight", 1),
    "score": TensorName("score.weight", 1),
}

FAMILY = Family(
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=GPTNeoXTransformer,
    tensors=TENSORS,
    # Masks and frequencies, which old versions stored.
    ignored_tensors=(
        ".attention.bias",
        ".attention.masked_bias",
        ".rotary_emb.inv_freq",
    ),
    rename=lambda name: "embed_out.weight" if name == "lm_head.weight" else name,
)
"""GPT-NeoX, and Pythia."""
