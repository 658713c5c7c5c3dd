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
from jaxpref.models.adapter_tensors import module_arrays, prefixed
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families.family import StoredArray, join
from jaxpref.models.folder_config import write_adapter_head
from jaxpref.models.layout import reshard
from jaxpref.models.reward import RewardModel
from jaxpref.models.reward_head import LAST
from jaxpref.models.soft_prompt import MOST, PROMPT
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
    """The soft prompt of a folder, and the head of a reward model.

    They are in the model's parameter dtype, on every device.

    Raises:
        InputError: if it does not fit the model, or is not finite.
    """
    shapes = {TENSOR: [soft_prompt_length(folder), model.architecture.hidden_size]}
    head = _head(model)
    for array in head.values():
        shapes[array.name.template] = list(array.stored_shape)
    stored = open_file(Path(folder) / WEIGHTS)
    if {name: stored[name].get_shape() for name in stored} != shapes:
        expected = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(
            f"{folder}: expected the tensors {expected} and no others; pass the model "
            "that it belongs to with --model"
        )
    values = {name: stored[name][:].astype(np.float32) for name in shapes}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise InputError(f"{folder}: tensor {name} holds NaN or infinite values")
    found = {PROMPT: values[TENSOR]}
    for path, array in head.items():
        whole = (slice(None),) * len(array.inner)
        found[path] = array.read(values[array.name.template], whole)
    dtype = jnp.dtype(model.numerics.param_dtype)
    placed = lambda x: reshard(jnp.asarray(x, dtype), P(None, None))
    return {path: placed(x) for path, x in found.items()}


def _head(model: Any) -> dict[str, StoredArray]:
    """Where `peft` stores the head of a reward model; nothing for a language model."""
    if not isinstance(model, RewardModel):
        return {}
    tree = jax.eval_shape(model.init, jax.random.key(0))
    # With prompt tuning, `peft` puts no module of its own between itself and the model.
    arrays = module_arrays(model.architecture.family, tree)
    return {path: prefixed(arrays[path], "base_model.") for path in model.head.paths}


def save_soft_prompt(
    folder: Path, model: Any, trained: Any, *, base: str, dtype: str
) -> None:
    """Writes a folder that `peft` loads.  All processes call this; the first writes.

    Raises:
        InputError: if it cannot be written, or is not finite in `dtype`.
    """
    a, head = model.architecture, _head(model)
    tensors = {TENSOR: gathered(trained[PROMPT])}
    for path, array in head.items():
        tensors[array.name.template] = join([(array, gathered(trained[path]))])
    for name, value in tensors.items():
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
        if not np.isfinite(tensors[name]).all():
            raise InputError(
                f"tensor {name} is not finite in {dtype}; nothing is saved"
            )
    if jax.process_index() != 0:
        return
    fields = {
        "peft_type": KIND,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "modules_to_save": [LAST] if head else None,
        "base_model_name_or_path": base,
        "num_virtual_tokens": len(tensors[TENSOR]),
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
        if head:
            write_adapter_head(folder, a, model.head)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        # The library creates files that only their owner can read.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: the soft prompt cannot be written ({reason}); free some space "
            "or choose another folder"
        ) from None
