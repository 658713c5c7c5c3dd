"""Reading the config.json of a model folder of any family."""

from pathlib import Path
from typing import Any, get_args

from jaxpref.errors import InputError
from jaxpref.files import RUN, kind_of, read_json, write_json
from jaxpref.models import families
from jaxpref.models.architecture import Architecture
from jaxpref.models.config_json import HARMLESS, ConfigFields
from jaxpref.models.reward_head import Head, Layers


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
            f"{source}: field model_type is {model_type!r}; supported: "
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
    fields.check_all_read({*HARMLESS, HEAD_FIELD, *family.harmless})
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
    """Whether a folder's config.json is that of a reward model.

    Raises:
        InputError: if config.json cannot be read.
    """
    fields = read_json(Path(folder) / "config.json")
    architectures = fields.get("architectures")
    if not isinstance(architectures, list):
        return False
    classifier = any(str(a).endswith("SequenceClassification") for a in architectures)
    return classifier or HEAD_FIELD in fields


HEAD_FIELD = "reward_head"
"""The field of config.json that says what `transformers` has no field for: the layers
of the head, and the temperature of an embedding."""


HEAD_FILE = "reward_head.json"
"""In the folder of a reward model's adapter: the same fields for the head that it
holds.  `peft` writes no such file; the head is then of the kind that the base has."""


def read_head(folder: str | Path) -> Head:
    """The head of the reward model in a folder; see `head_from_fields`.

    Raises:
        InputError: if config.json cannot be read, or describes no head.
    """
    path = Path(folder) / "config.json"
    return head_from_fields(read_json(path), path)


def read_adapter_head(folder: str | Path) -> Head | None:
    """The head in the folder of a reward model's adapter; None if it names none.

    Raises:
        InputError: if reward_head.json cannot be read, or describes no head.
    """
    path = Path(folder) / HEAD_FILE
    return head_from_fields(read_json(path), path) if path.exists() else None


def head_from_fields(values: dict[str, Any], path: Path) -> Head:
    """The head that the fields of a JSON file describe.

    Several labels (`id2label`) are the names of attributes, unless `reward_head` says
    that the numbers are an embedding.  A single label, whatever its name, is a reward,
    unless `reward_head` says that it is a rating.

    Raises:
        InputError: if they describe none; messages name `path`.
    """
    fields = ConfigFields(values, str(path))
    own = ConfigFields(fields.read(HEAD_FIELD, dict, {}), f"{path}: {HEAD_FIELD}")
    labels = fields.read("id2label", dict, {})
    try:
        names = tuple(str(labels[str(n)]) for n in range(len(labels)))
    except KeyError as error:
        raise InputError(
            f"{path}: field id2label has no label {error}; number them from 0"
        ) from None
    layers = own.read("layers", str, "linear")
    if layers not in get_args(Layers):
        raise InputError(
            f"{own.source}: field layers is {layers!r}; use "
            f"{' or '.join(get_args(Layers))}"
        )
    temperature = own.read("temperature", float, 0.0)
    rating = own.read("rating", bool, False)
    own.check_all_read(())
    if temperature:
        return Head(layers, embedding=len(names), temperature=temperature)
    return Head(layers, attributes=names if len(names) > 1 or rating else ())


def write_adapter_head(folder: Path, architecture: Architecture, head: Head) -> None:
    """Describes the head in the folder of a reward model's adapter."""
    fields = head_to_fields(architecture, head)
    names = "id2label", HEAD_FIELD
    own = {name: fields[name] for name in names if name in fields}
    write_json(folder / HEAD_FILE, own)


def head_to_fields(architecture: Architecture, head: Head) -> dict[str, Any]:
    """The config.json of a reward model, besides that of its backbone.

    `transformers` has no class for a head of two layers; its class is then that of the
    backbone alone.
    """
    classifier = architecture.family.classifier
    own: dict[str, Any] = {}
    if head.layers != "linear":
        classifier = f"{classifier.removesuffix('ForSequenceClassification')}Model"
        own = {"layers": head.layers}
    if head.embedding:
        own["temperature"] = head.temperature
    if len(head.attributes) == 1:
        own["rating"] = True
    labels = head.attributes or [f"LABEL_{n}" for n in range(head.size)]
    return {
        "architectures": [classifier],
        "id2label": {str(n): label for n, label in enumerate(labels)},
        "label2id": {label: n for n, label in enumerate(labels)},
        **({HEAD_FIELD: own} if own else {}),
    }
