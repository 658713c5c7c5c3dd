"""Mistral: Llama with a sliding window in every layer."""

import dataclasses
from typing import Any

from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family
from jaxpref.models.families.window import read_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralArchitecture(llama.LlamaArchitecture):
    """The architecture of a Mistral model."""

    @property
    def family(self) -> Family:
        """Mistral."""
        return FAMILY


def read_config(fields: ConfigFields) -> MistralArchitecture:
    """See `Family`."""
    fields.require("hidden_act", "silu")
    sizes = llama.read_sizes(fields, num_kv_heads=8, max_position_embeddings=131072)
    return MistralArchitecture(**sizes, sliding_window=read_window(fields, 4096))


def write_config(architecture: MistralArchitecture) -> dict[str, Any]:
    """See `Family`."""
    fields = llama.write_config(architecture)
    return fields | {"sliding_window": architecture.sliding_window}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    harmless=(),
)
