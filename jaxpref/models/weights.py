"""A model on disk: its folder, and maybe that of an adapter, or a run's checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxpref.errors import InputError
from jaxpref.files import read_json
from jaxpref.models.adapter_config import CONFIG
from jaxpref.models.adapter_files import load_adapter
from jaxpref.models.folder_config import is_reward_model, read_adapter_head, read_head
from jaxpref.models.hub import resolve_folder
from jaxpref.models.quantized import Quantization
from jaxpref.models.quantized_files import load_quantized
from jaxpref.models.reward_head import Head
from jaxpref.models.saved import Saved, load_saved
from jaxpref.models.soft_prompt_files import load_soft_prompt, soft_prompt_length


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a model on disk."""

    folder: Path
    """The model's folder."""
    adapter: Path | None = None
    """The folder of an adapter of it, or None."""
    quantization: Quantization | None = None
    """How the matrices of its layers are held in memory; None for floating point."""
    saved: Saved | None = None
    """A checkpoint of a run that began with these; None for the weights themselves."""


def load_weights(weights: Weights, model: Any) -> Any:
    """A model's parameters; those with an adapter are `LowRank`, not merged.

    With a soft prompt, also that: texts then need placeholders, see `soft_prompt`.

    Raises:
        InputError: as `load_params`, `load_adapter` and `load_saved`.
    """
    folder, kind = weights.folder, weights.quantization
    if weights.saved is not None:
        return load_saved(weights.saved, folder, model)
    if weights.adapter is None:
        return load_quantized(folder, model, kind)
    if soft_prompt_length(weights.adapter):
        prompt = load_soft_prompt(weights.adapter, model)
        # A reward model's head is part of the adapter, and need not be in the folder.
        frozen = lambda path: path not in prompt
        key = jax.random.key(0) if "score" in prompt else None
        return load_quantized(folder, model, kind, key, only=frozen) | prompt
    lora, trained = load_adapter(weights.adapter, model)
    # A reward head that the adapter has need not be in the model's folder.
    key = jax.random.key(0) if "score" in lora.whole else None
    frozen = load_quantized(folder, model, kind, key, only=lora.freezes)
    return lora.join(trained, frozen)


def resolve_weights(
    model: str, adapter: str | None, quantization: Quantization | None = None
) -> Weights:
    """The weights of a model and of its adapter, which may be Hub IDs.

    Raises:
        InputError: if one cannot be found.
    """
    folder = None if adapter is None else resolve_folder(adapter)
    return Weights(resolve_folder(model), folder, quantization)


def model_or_adapter(name: str) -> Weights:
    """The weights of a model, or of an adapter and the base that its config names.

    Args:
        name: a folder or Hub ID.

    Raises:
        InputError: if it or its base cannot be found, if it is an adapter that names
            no base, or if it holds both a model and an adapter.
    """
    folder = resolve_folder(name)
    if not (path := folder / CONFIG).exists():
        return Weights(folder)
    # Some tools store the base's config.json beside the adapter.
    if model := sorted(folder.glob("model*.safetensors")):
        raise InputError(
            f"{folder}: holds a model ({model[0].name}) and an adapter ({CONFIG}); "
            "move one of them to a folder of its own"
        )
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{path}: field base_model_name_or_path is {base!r}; write the folder or "
            "Hub ID of the model that the adapter belongs to into it"
        )
    try:
        return Weights(resolve_folder(base), folder)
    except InputError as error:
        raise InputError(f"{path}: field base_model_name_or_path: {error}") from None


def is_reward(weights: Weights) -> bool:
    """Whether these are a reward model, which the base alone need not be.

    Raises:
        InputError: if a config cannot be read.
    """
    if weights.saved is not None and weights.saved.is_reward:
        return True
    return _adapts_reward_model(weights) or is_reward_model(weights.folder)


def head_of(weights: Weights) -> Head:
    """The head of a reward model: the one that the adapter names, or the folder's.

    A language model's is that of a single reward.  Checkpoints with other heads are
    refused where they are read.

    Raises:
        InputError: if a folder's description of it cannot be read.
    """
    if weights.adapter is not None and _adapts_reward_model(weights):
        if (own := read_adapter_head(weights.adapter)) is not None:
            return own
    if not is_reward_model(weights.folder):
        return Head()
    head = read_head(weights.folder)
    return head if weights.saved is None else Head(head.layers)


def _adapts_reward_model(weights: Weights) -> bool:
    if weights.adapter is None:
        return False
    return read_json(weights.adapter / CONFIG).get("task_type") == "SEQ_CLS"
