"""Adapter folders of `peft`: adapter_config.json and adapter_model.safetensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxpref.errors import InputError
from jaxpref.files import read_json, write_json
from jaxpref.models.adapter_config import (
    CONFIG,
    AdapterConfig,
    adapter_fields,
    read_adapter_config,
)
from jaxpref.models.adapter_tensors import (
    PREFIX,
    magnitude,
    module_arrays,
    own_ranks,
    pairs,
    prefixed,
    read_second,
    stored_factors,
)
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families.family import StoredArray, join
from jaxpref.models.folder_config import write_adapter_head
from jaxpref.models.lora import Lora, factor_shapes, matrices
from jaxpref.models.paths import by_path, nested
from jaxpref.models.stored import gathered
from jaxpref.models.tensor_files import entries, open_file
from jaxpref.runtime.heartbeat import beat

WEIGHTS = "adapter_model.safetensors"


def read_lora(folder: Path, model: Any) -> Lora:
    """The structure of an adapter; reads the config and headers, but no weights.

    Modules may have different ranks and scales, and layers may have none: the arrays of
    all layers then have the largest rank, padded with zeros, which training keeps.

    Args:
        folder: a folder of `peft`.
        model: the language model or reward model that it adapts.

    Raises:
        InputError: if it is not a LoRA adapter of this model, or changes the function
            in a way that is not supported.
    """
    return _read(Path(folder), model)[0]


def load_adapter(folder: Path, model: Any) -> tuple[Lora, Any]:
    """An adapter: its structure, and what is trained, as `Lora.trained` returns it.

    The arrays are in the model's parameter dtype and in the layout of the mesh.

    Raises:
        InputError: as `read_lora`, or if a value is not finite.
    """
    folder = Path(folder)
    lora, config, stored = _read(folder, model)
    shapes = factor_shapes(lora, model)
    values = {}
    tree = jax.eval_shape(model.init, jax.random.key(0))
    arrays, leaves = module_arrays(model.architecture.family, tree), by_path(tree)
    for path in lora.adapted:
        a, b = _factors(folder, config, lora, path, arrays[path], stored)
        values[f"{path}.a"], values[f"{path}.b"] = a, b
        if lora.dora:
            values[f"{path}.m"] = _whole(folder, magnitude(arrays[path]), stored)
    for path in lora.whole:
        shapes[path] = leaves[path]
        values[path] = _whole(folder, prefixed(arrays[path]), stored)
    return lora, nested({p: _placed(values[p], shapes[p]) for p in shapes})


def save_adapter(
    folder: Path,
    lora: Lora,
    model: Any,
    trained: Any,
    *,
    base: str,
    dtype: str,
    reward: bool,
) -> None:
    """Writes a folder that `peft` loads.  All processes call this; the first writes.

    Args:
        folder: the folder to write.
        lora: the structure of the adapter.
        model: the model that it adapts.
        trained: its arrays.
        base: the name or folder of the model, for `base_model_name_or_path`.
        dtype: dtype of the stored tensors.
        reward: whether the model is a reward model.

    Raises:
        InputError: if it cannot be written, or a value is not finite in `dtype`.
    """
    family = model.architecture.family
    tree = jax.eval_shape(model.init, jax.random.key(0))
    arrays = module_arrays(family, tree)
    leaves = {path: gathered(leaf) for path, leaf in by_path(trained).items()}
    tensors = stored_factors(lora, arrays, leaves)
    whole = [(prefixed(arrays[path]), leaves[path]) for path in lora.whole]
    for entry in entries(whole):
        parts = [(array, value[entry.index]) for array, value in entry.parts]
        tensors[entry.tensor] = join(parts)
    for name, value in tensors.items():
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
        if not np.isfinite(tensors[name]).all():
            raise InputError(
                f"tensor {name} is not finite in {dtype}; nothing is saved"
            )
    if jax.process_index() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fields = adapter_fields(lora, family, arrays, base, reward)
        write_json(folder / CONFIG, fields)
        if reward:
            write_adapter_head(folder, model.architecture, model.head)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        # The library creates files that only their owner can read.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: the adapter cannot be written ({reason}); free some space or "
            "choose another folder"
        ) from None


# --- reading


def _read(folder: Path, model: Any) -> tuple[Lora, AdapterConfig, dict[str, Any]]:
    path, family = folder / CONFIG, model.architecture.family
    if not path.exists():
        raise InputError(
            f"{folder}: has no {CONFIG}; pass the folder of a LoRA adapter, such as "
            "OUT/adapter of a run with --lora.rank"
        )
    config = read_adapter_config(ConfigFields(read_json(path), str(path)))
    if not (folder / WEIGHTS).exists():
        raise InputError(
            f"{folder}: has no {WEIGHTS}; only safetensors are read, so convert other "
            "weights first"
        )
    stored = open_file(folder / WEIGHTS)
    names, layers = set(stored), model.architecture.num_layers
    tree = jax.eval_shape(model.init, jax.random.key(0))
    arrays, used = module_arrays(family, tree), set()
    adapted, rank = {}, 0
    for path, name in matrices(family).items():
        array = arrays[path]
        inputs = math.prod(array.inner[: name.inputs])
        outputs = math.prod(array.outputs)
        for a, b in pairs(array):
            if not {a, b} & names:
                continue
            for tensor in (a, b):
                if tensor not in names:
                    raise InputError(f"{folder}: tensor {tensor} is missing")
            r = stored[a].get_shape()[0]
            _check_shape(folder, a, stored, (r, inputs))
            _check_shape(folder, b, stored, (outputs, r))
            ranks = adapted.setdefault(path, _own_ranks(folder, path, array, stored))
            rank = max(rank, len(range(r)[ranks]))
            used |= {a, b}
        if config.dora and path in adapted:
            norms = list(magnitude(array).tensors.flat)
            _check_all_layers(folder, [*sum(pairs(array), ()), *norms], names)
            for tensor in norms:
                _check_shape(folder, tensor, stored, (outputs,))
            used |= {*norms}
    whole = []
    for path, array in arrays.items():
        tensors = list(prefixed(array).tensors.flat)
        if names.issuperset(tensors):
            for tensor in tensors:
                _check_shape(folder, tensor, stored, array.stored_shape)
            whole.append(path)
            used.update(tensors)
    if names := names - used:
        raise InputError(
            f"{folder}: tensor {min(names)} is not the adapter of a matrix of this "
            f"{family.model_type} model with {layers} layers, nor one of its "
            f"parameters (unknown: {len(names)})"
        )
    if not adapted:
        raise InputError(f"{folder}: has no adapters")
    adapter = tuple(adapted), tuple(whole)
    lora = Lora(rank, config.alpha, config.rank_stabilized, *adapter, config.dora)
    return lora, config, stored


def _check_all_layers(folder: Path, tensors: list[str], stored: set[str]) -> None:
    # A layer without an adapter would need the norms of the base.
    for tensor in tensors:
        if tensor not in stored:
            raise InputError(
                f"{folder}: tensor {tensor} is missing; with use_dora, a matrix needs "
                "adapters in all layers"
            )


def _own_ranks(
    folder: Path, path: str, array: StoredArray, stored: Mapping[str, Any]
) -> slice:
    if not array.name.parts:
        return slice(None)
    factors = [_values(folder, b, stored) for _, b in pairs(array) if b in stored]
    return own_ranks(path, array, factors)


def _check_shape(
    folder: Path, tensor: str, stored: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    if (found := stored[tensor].get_shape()) != list(shape):
        raise InputError(
            f"{folder}: tensor {tensor} has shape {found}, but the model needs "
            f"{list(shape)}; pass the model that it adapts with --model"
        )


def _factors(
    folder: Path,
    config: AdapterConfig,
    lora: Lora,
    path: str,
    array: StoredArray,
    stored: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """The factors a [L, inputs, r] and b [L, r, outputs], inputs and outputs flat."""
    found, ranks = [], _own_ranks(folder, path, array, stored)
    for pair in pairs(array):
        if pair[0] not in stored:
            found.append(None)
            continue
        a, b = (_values(folder, tensor, stored) for tensor in pair)
        module = pair[0].removeprefix(PREFIX).removesuffix(".lora_A.weight")
        scale = np.float32(config.scale(module, len(a)) / lora.scale)
        a, b = a[ranks], read_second(array, b)[ranks] * scale
        more = lora.rank - len(b)
        padded = np.pad(a.T, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))
        found.append(padded)
    zeros = [np.zeros_like(x) for x in next(pair for pair in found if pair)]
    a, b = (np.stack(x) for x in zip(*(pair or zeros for pair in found)))
    return a, b


def _whole(folder: Path, array: StoredArray, stored: Mapping[str, Any]) -> np.ndarray:
    index = (slice(None),) * len(array.inner)
    read = lambda tensor: array.read(_values(folder, tensor, stored), index)
    return np.stack([read(tensor) for tensor in array.tensors.flat])


def _values(folder: Path, tensor: str, stored: Mapping[str, Any]) -> np.ndarray:
    beat(f"reading {folder}: {tensor}")
    values = stored[tensor][:].astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{folder}: tensor {tensor} holds NaN or infinite values")
    return values


def _placed(values: np.ndarray, leaf: Any) -> jax.Array:
    values = values.reshape(leaf.shape).astype(leaf.dtype)
    if leaf.sharding is None:
        return jnp.asarray(values)
    sharding = NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda i: values[i])


# --- writing
