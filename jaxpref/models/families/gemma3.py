"""Gemma 3, the text model: Gemma 2 with normalized queries and keys.

Layers with sliding attention have a rotary base of their own.

Source: Gemma Team 2025, arXiv:2503.19786.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError
from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import gemma, gemma2, llama
from jaxpref.models.families.family import Family
from jaxpref.models.families.qwen3 import NORMS
from jaxpref.models.families.rope import read_rope, write_rope
from jaxpref.models.families.window import layer_types, read_layer_types, read_window
from jaxpref.models.layout import SPECS
from jaxpref.models.numerics import Numerics
from jaxpref.models.rotary import RopeScaling
from jaxpref.models.transformer import Attend, Rngs, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Architecture(gemma2.Gemma2Architecture):
    """The architecture of a Gemma 3 model."""

    sliding_rope_theta: float = at_least(1, default=10000.0)
    """The rotary base of layers with sliding attention."""
    sliding_rope_scaling: RopeScaling | None = None
    """The scaling of their frequencies."""

    def __post_init__(self):
        super().__post_init__()
        if self.sliding_layers is None:
            raise InputError("architecture: sliding_layers is missing; give a tuple")

    @property
    def family(self) -> Family:
        """Gemma 3."""
        return FAMILY


class Gemma3Block(gemma2.Gemma2Block):
    """Gemma 2's block with an RMSNorm of each head's query and key."""

    def __init__(
        self, architecture: llama.LlamaArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        shape = (architecture.num_layers, architecture.head_dim)
        self.query_norm = zeros(numerics, shape, SPECS.layer_norm)
        self.key_norm = zeros(numerics, shape, SPECS.layer_norm)

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Normed and scaled queries, normed keys, and values."""
        q, k, v = llama.LlamaBlock.project(self, h)
        q = self.norm(q, self.query_norm[...]) * self.query_factor()
        return q, self.norm(k, self.key_norm[...]), v

    def attend(
        self, h: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T H K"], Any]:
        """Attention with the angles of the kind of layer."""
        pairs = zip(*shared, strict=True)
        shared = [jnp.where(attributes["sliding"], *pair) for pair in pairs]
        return super().attend(h, shared, attributes, attend)


class Gemma3Transformer(gemma.GemmaTransformer):
    """Gemma 3's modules."""

    block = Gemma3Block

    def shared_inputs(self, positions: Int[Array, "B T"]) -> Any:
        """Cosines and sines of layers with sliding, and with full attention."""
        a: Any = self.architecture
        return (
            self.angles(positions, a.sliding_rope_theta, a.sliding_rope_scaling),
            self.angles(positions, a.rope_theta, a.rope_scaling),
        )


def read_config(fields: ConfigFields) -> Gemma3Architecture:
    """See `Family`."""
    nested = fields.get("rope_parameters")
    kinds = ("full_attention", "sliding_attention")
    if isinstance(nested, dict) and set(nested) <= set(kinds):
        full, sliding = ({"rope_parameters": nested.get(kind)} for kind in kinds)
    else:
        full = {n: fields.get(n) for n in ("rope_theta", "rope_scaling")}
        full["rope_parameters"] = nested
        sliding = {"rope_theta": fields.get("rope_local_base_freq")}
    flat = {n: x for n, x in fields.values.items() if not n.startswith("rope_")}
    read = dataclasses.replace(fields, values=flat | full)
    sizes = gemma.read_sizes(
        read, num_kv_heads=4, max_position_embeddings=131072, theta=1e6
    )
    local = read_rope(
        ConfigFields(sliding, fields.source), sizes["max_position_embeddings"]
    )
    pattern = fields.read("sliding_window_pattern", int, 6)
    if pattern < 1:
        raise InputError(
            f"{fields.source}: field sliding_window_pattern is {pattern}; must be at "
            "least 1"
        )
    default = [(n + 1) % pattern > 0 for n in range(sizes["num_layers"])]
    return Gemma3Architecture(
        **sizes,
        **gemma2.read_caps(fields, None, None),
        sliding_window=read_window(fields, 4096),
        sliding_layers=read_layer_types(fields, default),
        sliding_rope_theta=local.theta,
        sliding_rope_scaling=local.scaling,
    )


def write_config(architecture: Gemma3Architecture) -> dict[str, Any]:
    """See `Family`."""
    a = architecture
    fields = gemma2.write_config(a) | {"layer_types": layer_types(a)}
    if a.sliding_rope_scaling is None:
        return fields | {"rope_local_base_freq": a.sliding_rope_theta}
    # Only transformers 5 has a scaling for these layers.
    del fields["rope_theta"], fields["rope_scaling"]

    def new(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
        written = write_rope(theta, scaling)
        return {"rope_theta": theta, **(written["rope_scaling"] or {})}

    return fields | {
        "rope_parameters": {
            "full_attention": new(a.rope_theta, a.rope_scaling),
            "sliding_attention": new(a.sliding_rope_theta, a.sliding_rope_scaling),
        }
    }


FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=Gemma3Transformer,
    tensors={**gemma2.FAMILY.tensors, **NORMS},
    harmless=("cache_implementation", "_sliding_window_pattern"),
)
