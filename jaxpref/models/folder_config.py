"""Reading the config.json of a model folder of any family."""

from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.files import RUN, kind_of, read_json
from jaxpref.models import families
from jaxpref.models.architecture import Architecture
from jaxpref.models.config_json import HARMLESS, ConfigFields


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture in a folder's config.json.

    Raises:
        InputError: if config.json cannot be read or has an unsupported field.
    """
    path = Path(folder) / "config.json"
    if kind_of(path.parent) == RUN:
        raise InputError(
            f"{folder}: is the folder of a run; pass its export, {path.parent}/export"
        )
    return architecture_from_fields(read_json(path), path)


def architecture_from_fields(
    values: dict[str, Any], source: str | Path
) -> Architecture:
    """The architecture in the fields of a config.json; messages name `source`.

    Raises:
        InputError: if a field is missing, malformed, or not supported.
    """
    fields = ConfigFields(values, str(source))
    supported = {family.model_type: family for family in families.FAMILIES}
    model_type = fields.get("model_type")
    family = supported.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(
            f"{source}: field model_type is {model_type!r}; supported are "
            f"{', '.join(sorted(supported))}"
        )
    if fields.get("quantization_config") is not None:
        raise InputError(
            f"{source}: field quantization_config: quantized weights cannot be "
            "trained; use a folder with float32, float16 or bfloat16 weights"
        )
    try:
        architecture = family.read_config(fields)
    except InputError as error:
        message = str(error)
        if not message.startswith(fields.source):
            message = f"{source}: {message}"
        raise InputError(message) from None
    fields.check_all_read({*HARMLESS, *family.harmless})
    return architecture


def architecture_to_fields(architecture: Architecture) -> dict[str, Any]:
    """The config.json of a language model."""
    family = architecture.family
    return {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        **family.write_config(architecture),
    }


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder's config.json is that of a sequence classifier.

    Raises:
        InputError: if config.json cannot be read.
    """
    architectures = read_json(Path(folder) / "config.json").get("architectures")
    if not isinstance(architectures, list):
        return False
    return any(str(a).endswith("SequenceClassification") for a in architectures)
