"""Gemma 3 with a vision part (4B, 12B, 27B), whose text model is read and trained.

The vision tower and the projector are neither read nor trained; an export has copies
of them.  Records with images are refused when data is read.

Source: Gemma Team 2025, arXiv:2503.19786.
"""

import dataclasses
from typing import Any

from jaxpref.models.config_json import HARMLESS, ConfigFields
from jaxpref.models.families import gemma3
from jaxpref.models.families.family import Family, TensorName

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
"""Fields of `text_config` that the published folders may lack, in `transformers`."""
TEXT, LANGUAGE_MODEL = "language_model.model.", "model.language_model."
"""What precedes the names of the text model's tensors, and of its modules."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3VisionArchitecture(gemma3.Gemma3Architecture):
    """The architecture of the text model of a Gemma 3 model with a vision part."""

    @property
    def family(self) -> Family:
        """Gemma 3 with a vision part."""
        return FAMILY


def read_config(fields: ConfigFields) -> Gemma3VisionArchitecture:
    """See `Family`."""
    text = {n: x for n, x in fields.read("text_config", dict).items() if x is not None}
    tied = {"tie_word_embeddings": fields.read("tie_word_embeddings", bool, True)}
    nested = ConfigFields(DEFAULTS | tied | text, f"{fields.source}: text_config")
    nested.require("model_type", gemma3.FAMILY.model_type)
    nested.require("tie_word_embeddings", tied["tie_word_embeddings"])
    architecture = gemma3.read_config(nested)
    nested.check_all_read({*HARMLESS, *gemma3.FAMILY.harmless})
    values = vars(architecture)  # by field
    return Gemma3VisionArchitecture(**values)


def write_config(architecture: Gemma3VisionArchitecture) -> dict[str, Any]:
    """See `Family`."""
    text = {"model_type": gemma3.FAMILY.model_type}
    return {
        "text_config": text | gemma3.write_config(architecture),
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "initializer_range": architecture.initializer_range,
    }


def stored_name(name: str) -> str:
    """The name of a tensor in the published folders; some have those of modules."""
    if name.startswith(LANGUAGE_MODEL):
        return TEXT + name.removeprefix(LANGUAGE_MODEL)
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name


def module_name(name: str) -> str:
    """The name of a text tensor in the module `Gemma3ForConditionalGeneration`."""
    return name.replace(TEXT, LANGUAGE_MODEL).replace("language_model.lm", "lm")


def _text_tensor(name: TensorName) -> TensorName:
    template = name.template.replace("lm_head", "language_model.lm_head")
    if template.startswith("model."):
        template = TEXT + template.removeprefix("model.")
    return dataclasses.replace(name, template=template)


VISION = ("vision_tower.", "multi_modal_projector.")
FAMILY = dataclasses.replace(
    gemma3.FAMILY,
    model_type="gemma3",
    causal_lm="Gemma3ForConditionalGeneration",
    classifier="Gemma3ForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    tensors={path: _text_tensor(n) for path, n in gemma3.FAMILY.tensors.items()},
    harmless=(
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "initializer_range",
    ),
    copied_tensors=(*VISION, *(f"model.{name}" for name in VISION)),
    rename=stored_name,
    module_name=module_name,
)
