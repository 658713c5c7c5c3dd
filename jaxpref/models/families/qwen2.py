"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

import dataclasses
from typing import Any

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Architecture(llama.LlamaArchitecture):
    """The architecture of a Qwen2 model."""

    projection_bias: bool = True

    @property
    def family(self) -> Family:
        """Qwen2."""
        return FAMILY


def read_windows(fields: ConfigFields, layers: int) -> dict[str, Any]:
    """The sliding window of the upper layers.

    Raises:
        InputError: if the fields contradict each other.
    """
    first = fields.read("max_window_layers", int, 28)
    uses = fields.read("use_sliding_window", bool, False)
    window = read_window(fields, 4096) if uses else None
    fields.get("sliding_window")  # without effect unless it is used
    default = [window is not None and n >= first for n in range(layers)]
    sliding = read_layer_types(fields, default)
    if any(sliding) and window is None:
        raise InputError(
            f"{fields.source}: field layer_types has sliding attention, but "
            "use_sliding_window is false or sliding_window is null; make them agree"
        )
    return window_of(window, sliding)


def write_windows(architecture: llama.LlamaArchitecture) -> dict[str, Any]:
    """The fields that `read_windows` reads."""
    types = layer_types(architecture)
    uses = architecture.sliding_window is not None
    first = types.index("sliding_attention") if uses else architecture.num_layers
    return {
        "use_sliding_window": uses,
        "sliding_window": architecture.sliding_window,
        "max_window_layers": first,
        "layer_types": types,
    }


def read_config(fields: ConfigFields) -> Qwen2Architecture:
    """See `Family`."""
    fields.require("hidden_act", "silu")
    sizes = llama.read_sizes(fields, max_position_embeddings=32768)
    return Qwen2Architecture(**sizes, **read_windows(fields, sizes["num_layers"]))


def write_config(architecture: Qwen2Architecture) -> dict[str, Any]:
    """See `Family`."""
    fields = llama.write_config(architecture)
    del fields["attention_bias"], fields["mlp_bias"]
    return fields | write_windows(architecture)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    harmless=(),
)
