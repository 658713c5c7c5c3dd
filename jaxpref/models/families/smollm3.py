"""SmolLM3: Llama in which some layers have no rotary positions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family
from jaxpref.models.families.window import (
    layer_types,
    read_layer_types,
    read_window,
    window_of,
)
from jaxpref.models.transformer import Attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Architecture(llama.LlamaArchitecture):
    """The architecture of a SmolLM3 model."""

    rotary_layers: tuple[bool, ...]
    """Whether each layer rotates queries and keys."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.rotary_layers) != self.num_layers:
            raise InputError(
                f"architecture: rotary_layers has {len(self.rotary_layers)} values "
                f"for {self.num_layers} layers"
            )

    @property
    def family(self) -> Family:
        """SmolLM3."""
        return FAMILY


class SmolLM3Block(llama.LlamaBlock):
    """Llama's block; in some layers, the angles of all positions are 0."""

    def attend(
        self, h: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T H K"], Any]:
        """Attention with rotary positions if the layer has them."""
        cos, sin = shared
        cos = jnp.where(attributes["rotary"], cos, 1)
        sin = jnp.where(attributes["rotary"], sin, 0)
        return super().attend(h, (cos, sin), attributes, attend)


class SmolLM3Transformer(llama.LlamaTransformer):
    """SmolLM3's modules."""

    block = SmolLM3Block

    def layer_attributes(self) -> dict[str, jax.Array]:
        """Whether layers rotate, and whether they have sliding attention."""
        a: Any = self.architecture
        return super().layer_attributes() | {"rotary": jnp.array(a.rotary_layers)}


def read_config(fields: ConfigFields) -> SmolLM3Architecture:
    """See `Family`."""
    fields.require("hidden_act", "silu")
    sizes = llama.read_sizes(
        fields,
        num_kv_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    every = fields.read("no_rope_layer_interval", int, 4)
    numbers = range(sizes["num_layers"])
    rotary = fields.get("no_rope_layers")  # 1 for layers that rotate
    if rotary is None:
        rotary = [every < 1 or (n + 1) % every != 0 for n in numbers]
    if not isinstance(rotary, list) or not set(rotary) <= {0, 1}:
        raise InputError(
            f"{fields.source}: field no_rope_layers is {rotary!r}, not a list of 0 "
            "and 1"
        )
    uses = fields.read("use_sliding_window", bool, False)
    window = read_window(fields, 1) if uses and fields.get("sliding_window") else None
    fields.get("sliding_window")
    layers = read_layer_types(fields, [window is not None and not x for x in rotary])
    return SmolLM3Architecture(
        **sizes,
        **llama.read_biases(fields),
        **window_of(window, layers),
        rotary_layers=tuple(map(bool, rotary)),
    )


def write_config(architecture: SmolLM3Architecture) -> dict[str, Any]:
    """See `Family`."""
    return llama.write_config(architecture) | {
        "no_rope_layers": list(map(int, architecture.rotary_layers)),
        "use_sliding_window": architecture.sliding_window is not None,
        "sliding_window": architecture.sliding_window,
        "layer_types": layer_types(architecture),
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    causal_lm="SmolLM3ForCausalLM",
    classifier="SmolLM3ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=SmolLM3Transformer,
    harmless=(),
)
