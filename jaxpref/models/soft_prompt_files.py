"""Soft prompts in folders of `peft` (PROMPT_TUNING)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxpref.errors import InputError
from jaxpref.files import read_json, write_json
from jaxpref.models.adapter_config import CONFIG
from jaxpref.models.adapter_files import WEIGHTS
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.layout import reshard
from jaxpref.models.soft_prompt import MOST, PROMPT, check_family
from jaxpref.models.stored import gathered
from jaxpref.models.tensor_files import open_file

KIND = "PROMPT_TUNING"
TENSOR = "prompt_embeddings"
HARMLESS = frozenset(
    # Identification, sizes of the model, and how the soft prompt was started.
    "base_model_name_or_path revision task_type peft_version auto_mapping "
    "inference_mode token_dim num_attention_heads num_layers prompt_tuning_init "
    "prompt_tuning_init_text prompt_tuning_init_state_dict_path "
    "tokenizer_name_or_path tokenizer_kwargs modules_to_save".split()
)
"""Fields of adapter_config.json that do not affect the function."""


def soft_prompt_length(folder: Path | None) -> int:
    """N of the soft prompt in an adapter's folder; 0 for another adapter, or none.

    Raises:
        InputError: if its adapter_config.json has a field that is not supported.
    """
    if folder is None or not (path := Path(folder) / CONFIG).exists():
        return 0
    values = read_json(path)
    if values.get("peft_type") != KIND:
        return 0
    fields = ConfigFields(values, str(path))
    fields.require("peft_type", KIND)
    fields.require("num_transformer_submodules", 1)
    length = fields.read("num_virtual_tokens", int)
    fields.check_all_read(HARMLESS)
    if not 1 <= length <= MOST:
        raise InputError(
            f"{path}: field num_virtual_tokens is {length}; it must be from 1 to {MOST}"
        )
    return length


def load_soft_prompt(folder: Path, model: Any) -> dict[str, jax.Array]:
    """The soft prompt of a folder, in the model's parameter dtype, on every device.

    Raises:
        InputError: if it does not fit the model, or is not finite.
    """
    check_family(model.architecture.family.model_type)
    shape = [soft_prompt_length(folder), model.architecture.hidden_size]
    stored = open_file(Path(folder) / WEIGHTS)
    if set(stored) != {TENSOR} or stored[TENSOR].get_shape() != shape:
        raise InputError(
            f"{folder}: expected one tensor, {TENSOR}, of shape {shape}; pass the "
            "model that it belongs to with --model"
        )
    values = stored[TENSOR][:].astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{folder}: tensor {TENSOR} holds NaN or infinite values")
    prompt = jnp.asarray(values, jnp.dtype(model.numerics.param_dtype))
    return {PROMPT: reshard(prompt, P(None, None))}


def save_soft_prompt(
    folder: Path, model: Any, trained: Any, *, base: str, dtype: str
) -> None:
    """Writes a folder that `peft` loads.  All processes call this; the first writes.

    Raises:
        InputError: if it cannot be written, or is not finite in `dtype`.
    """
    a = model.architecture
    with np.errstate(over="ignore"):
        values = gathered(trained[PROMPT]).astype(jnp.dtype(dtype))
    if not np.isfinite(values).all():
        raise InputError(f"tensor {TENSOR} is not finite in {dtype}; nothing is saved")
    if jax.process_index() != 0:
        return
    fields = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "num_virtual_tokens": len(values),
        "token_dim": a.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": a.num_heads,
        "num_layers": a.num_layers,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, fields)
        tensors = {TENSOR: np.ascontiguousarray(values)}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        # The library creates files that only their owner can read.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: the soft prompt cannot be written ({reason}); free some space "
            "or choose another folder"
        ) from None
