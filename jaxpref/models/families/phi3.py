"""Phi-3 and Phi-4: Llama with fused projections and partly rotated heads.

Our parameters are separate, so that each is sharded evenly.
"""

import dataclasses
from typing import Any

from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.rope import write_rope
from jaxpref.models.families.window import read_window
from jaxpref.models.rotary import LongRopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Architecture(llama.LlamaArchitecture):
    """The architecture of a Phi-3 model."""

    original_max_position_embeddings: int = at_least(1, default=4096)
    """The context of pre-training; only scaled rotary positions use it."""

    @property
    def family(self) -> Family:
        """Phi-3."""
        return FAMILY


CONTEXT = "original_max_position_embeddings"
FIXED = {"hidden_act": "silu", "full_attn_mod": 1, "interpolate_factor": 1}
"""Fields of config.json with the only supported value."""


def read_config(fields: ConfigFields) -> Phi3Architecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    for name, supported in FIXED.items():
        fields.require(name, supported)
    sizes = llama.read_sizes(
        _with_longrope(fields),
        partial_rotary=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )
    return Phi3Architecture(
        **sizes,
        original_max_position_embeddings=fields.read(CONTEXT, int, 4096),
        sliding_window=read_window(fields),
    )


def _with_longrope(fields: ConfigFields) -> ConfigFields:
    """The fields; what the first Phi-3 folders call su or yarn is longrope."""
    values = dict(fields.values)
    for name in ("rope_scaling", "rope_parameters"):
        nested = values.get(name)
        if isinstance(nested, dict):
            kinds = {key: nested[key] for key in ("type", "rope_type") if key in nested}
            old = {key: "longrope" for key in kinds if kinds[key] in ("su", "yarn")}
            values[name] = nested | old
    return dataclasses.replace(fields, values=values)


def write_config(architecture: Phi3Architecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read.

    Version 4 accepts no other fields of a scaling than its type and two lists.
    """
    a, scaling = architecture, architecture.rope_scaling
    fields = llama.write_config(a)
    for name in ("attention_bias", "mlp_bias"):
        del fields[name]
    if isinstance(scaling, LongRopeScaling):
        written = write_rope(a.rope_theta, scaling)["rope_scaling"]
        given = {"rope_type", CONTEXT}
        if scaling.factor == a.max_position_embeddings / getattr(scaling, CONTEXT):
            given.add("factor")
        fields["rope_scaling"] = {k: v for k, v in written.items() if k not in given}
    return fields | {
        "partial_rotary_factor": a.partial_rotary_factor,
        "sliding_window": a.sliding_window,
        CONTEXT: getattr(scaling or a, CONTEXT),
    }


def _fused(name: str, *parts: str) -> dict[str, TensorName]:
    paths = tuple(f"layers.{part}" for part in parts)
    tensor = TensorName(f"model.layers.{{}}.{name}.weight", 1, parts=paths)
    return dict.fromkeys(paths, tensor)


FAMILY = Family(
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=llama.LlamaTransformer,
    tensors=llama.TENSORS
    | _fused("self_attn.qkv_proj", "query", "key", "value")
    | _fused("mlp.gate_up_proj", "gate", "up"),
    harmless=("auto_map", "embd_pdrop", "resid_pdrop"),
)
"""Phi-3, and Phi-4, which has the same architecture."""
