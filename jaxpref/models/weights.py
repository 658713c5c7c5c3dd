"""A model on disk: its folder, and maybe that of an adapter, or a run's checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxpref.files import read_json
from jaxpref.models.adapter_config import CONFIG
from jaxpref.models.adapter_files import load_adapter
from jaxpref.models.folder_config import is_reward_model, read_head
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


def is_reward(weights: Weights) -> bool:
    """Whether these are a reward model, which the base alone need not be.

    Raises:
        InputError: if a config cannot be read.
    """
    if weights.saved is not None and weights.saved.is_reward:
        return True
    if weights.adapter is not None:
        if read_json(weights.adapter / CONFIG).get("task_type") == "SEQ_CLS":
            return True
    return is_reward_model(weights.folder)


def head_of(weights: Weights) -> Head:
    """The head of a reward model: that of the folder, or one of a single reward.

    Adapters and checkpoints with other heads are refused where they are read.

    Raises:
        InputError: if the folder's config.json cannot be read.
    """
    if not is_reward_model(weights.folder):
        return Head()
    head = read_head(weights.folder)
    return head if weights.saved is None else Head(head.layers)
