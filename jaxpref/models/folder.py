"""Hugging Face model folders (config.json + safetensors) of any family.

A folder holds a language model (`AutoModelForCausalLM`) or a reward model
(`AutoModelForSequenceClassification`); its config.json says which.
"""

import math
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray
from safetensors import SafetensorError

from jaxpref.errors import InputError
from jaxpref.files import read_json, write_json
from jaxpref.models.architecture import Architecture
from jaxpref.models.config_json import HARMLESS
from jaxpref.models.families import Family
from jaxpref.models.families.family import MLP_HEAD, StoredArray
from jaxpref.models.folder_config import (
    architecture_to_fields,
    head_to_fields,
    is_reward_model,
    read_architecture,
)
from jaxpref.models.functional import Model, Params
from jaxpref.models.layout import check_mesh
from jaxpref.models.paths import by_path, nested
from jaxpref.models.reward import Padding, RewardModel, reward_model
from jaxpref.models.reward_head import HIDDEN, LAST
from jaxpref.models.tensor_files import (
    DTYPES,
    INDEX,
    entries,
    open_tensors,
    stored_with,
    write_tensors,
)
from jaxpref.models.tokenizer_files import add_stop_tokens, copy_tokenizer
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.memory import check_arrays

AnyModel = Model | RewardModel
ROWS_BYTES = 2**25
"""Bytes of a tensor that are read at once."""
ALIGNMENT = 64
"""JAX on CPU copies arrays whose address is not a multiple of this."""


def check_folder(
    folder: str | Path,
    make: Callable[[Architecture], AnyModel] | None = None,
    *,
    new_head: bool = False,
) -> Architecture:
    """Checks that a folder's weights can be loaded; returns its architecture.

    Reads config.json and the headers of the weight files, but no weights: a run does
    this before it spends time on the data.

    Args:
        folder: the folder.
        make: the model to be loaded, of an architecture; by default that in
            config.json.
        new_head: whether a reward model may take the backbone of a language model, as
            `load_params` does with a `head_key`.

    Raises:
        InputError: whatever `load_params` would raise, except for values of weights.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    own = reward_model(folder) if is_reward_model(folder) else Model(architecture)
    model = own if make is None else make(architecture)
    stored = open_model(folder, architecture.family)
    match_tensors(folder, model, stored, new_head)
    return architecture


def load_params(
    folder: str | Path,
    model: AnyModel,
    head_key: PRNGKeyArray | None = None,
    *,
    only: Callable[[str], bool] = lambda path: True,
) -> Params:
    """The weights of a folder, cast to the model's `param_dtype`.

    Under a mesh (`jax.set_mesh`) every process reads only the shards of its own
    devices.  A tied model's folder may hold the LM head if it equals the embedding.

    Args:
        folder: the folder.
        model: a language model or a reward model, to match the folder.
        head_key: a random key.  With it, a reward model may be loaded from a language
            model's folder, and gets a new random head; otherwise unused.
        only: which parameters to load, by path; the result has no others.

    Raises:
        InputError: if a tensor is missing, unknown, has another shape or dtype, or
            contains a value that is not finite; if the mesh does not divide the
            model's sizes; or if the weights do not fit into memory.
    """
    folder = Path(folder)
    check_mesh(model.architecture)
    stored = open_model(folder, model.architecture.family)
    shapes, drawn = match_tensors(folder, model, stored, head_key is not None), {}
    new_head = LAST not in shapes and only(LAST)
    arrays = stored_arrays(model.architecture.family, shapes)
    shapes = nested({path: x for path, x in by_path(shapes).items() if only(path)})
    check_arrays(f"{folder}: the weights", shapes)
    if isinstance(model, RewardModel) and new_head:
        drawn = jax.jit(model.new_head)(head_key)
    _check_tied_head(folder, model, stored)
    leaves = [
        load_leaf(folder, stored, arrays[path], leaf)
        for path, leaf in by_path(shapes).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves) | drawn


def save(
    folder: str | Path,
    model: AnyModel,
    params: Params,
    source_folder: str | Path | None = None,
    dtype: str | None = None,
    *,
    padding: Padding | None = None,
    stop_tokens: Collection[int] = (),
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors that `transformers` loads.

    Everything is written to a temporary folder next to `folder` and then moved, so a
    crash leaves no half-written model.  Sharded parameters are gathered one
    layer's matrix at a time.  If there are several processes, all must call this; the
    first one writes.

    Args:
        folder: the folder to write; other files in an existing one stay as they are.
        model: the model.
        params: its parameters, sharded or not.
        source_folder: the original model folder.  Copied are its tokenizer files, the
            fields of its config.json that do not affect the architecture (token ids),
            and the weights of parts that are not read (vision towers).
        dtype: "float32", "float16" or "bfloat16"; by default that of the parameters.
        padding: from `reward.padding_of`; written to a reward model's config.json and
            tokenizer files; a language model's are unchanged.  Without it,
            `transformers` refuses to score more than one sequence at a time.
        stop_tokens: tokens that end an answer.  Those that `generation_config.json`
            lacks are added to it, so that every sampler stops where ours does.
        max_file_bytes: weights beyond this size are split over several files; one
            file's weights are held in host memory at a time.

    Raises:
        InputError: if it cannot be written, or a weight is not finite in `dtype`.
    """
    folder = Path(folder).resolve()
    source = None if source_folder is None else Path(source_folder)
    stored_dtype = np.dtype(jnp.dtype(dtype or model.numerics.param_dtype))
    if stored_dtype.name not in (known := DTYPES.values()):
        raise InputError(
            f"{folder}: weights are saved in {', '.join(known)}, not {stored_dtype}"
        )
    padding = padding if isinstance(model, RewardModel) else None
    fields = _config_fields(model, source, padding) | {"torch_dtype": stored_dtype.name}
    arrays = stored_arrays(model.architecture.family, params)
    tensors = entries((arrays[path], leaf) for path, leaf in by_path(params).items())
    copied = stored_with(source, model.architecture.family.copied_tensors)
    temporary = folder.parent / f".{folder.name}.partial"
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_json(temporary / "config.json", fields)
        target = temporary if writes else None
        write_tensors(target, tensors, stored_dtype, max_file_bytes, copied)
        if writes:
            copy_tokenizer(source, temporary, padding)
            add_stop_tokens(temporary, stop_tokens)
            move_into_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: the model cannot be written ({reason}); free some space or "
            "choose another folder"
        ) from None
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def stored_arrays(family: Family, tree: Params) -> dict[str, StoredArray]:
    """Where all arrays of a model, or those of such shapes, are stored, by path."""
    return family.stored({path: x.shape for path, x in by_path(tree).items()})


# --- reading


def open_model(folder: Path, family: Family) -> dict[str, Any]:
    """The tensors of a folder by the names of the family."""
    return family.renamed(open_tensors(folder), str(folder))


def match_tensors(
    folder: Path, model: AnyModel, stored: dict[str, Any], new_head: bool
) -> Params:
    """The shapes of the parameters that `stored` holds, for `load_leaf`.

    These are all of the model's, except its head if it is not stored and `new_head`.
    """
    family, layers = model.architecture.family, model.architecture.num_layers
    if layers > len(stored):  # each has several tensors, whose names are listed below
        raise InputError(
            f"{folder}: config.json says {layers:,} layers, but the weights have only "
            f"{len(stored):,} tensors; check that both files are from the same model"
        )
    shapes = dict(jax.eval_shape(model.init, jax.random.key(0)))
    head, score = (family.tensors[name].template for name in ("head", LAST))
    held = score if score in stored else MLP_HEAD[LAST].template
    if held in stored and LAST not in shapes:
        raise InputError(
            f"{folder}: holds a reward model (tensor {held}), which has no LM head; "
            "pass a language model, or use a reward-model loss such as bradley_terry"
        )
    ignored = set()
    if LAST in shapes and held not in stored:
        if not new_head:
            raise InputError(
                f"{folder}: holds no reward model (tensor {score} is missing); pass "
                "one, such as OUT/export of a run with --loss bradley_terry"
            )
        shapes = {path: x for path, x in shapes.items() if path not in (LAST, HIDDEN)}
        ignored = {head}
    elif model.architecture.tie_word_embeddings:
        ignored = {head}  # checked when loading
    expected = {}
    for array in stored_arrays(family, shapes).values():
        expected |= dict.fromkeys(array.tensors.flat, array.stored_shape)
    _check_names(folder, model.architecture, stored, expected, ignored)
    for name, shape in expected.items():
        found = stored[name].get_shape()
        if found != list(shape):
            raise InputError(
                f"{folder}: tensor {name} has shape {found}, but config.json says "
                f"{list(shape)}; check that both files are from the same model"
            )
        if (dtype := stored[name].get_dtype()) not in DTYPES:
            raise InputError(
                f"{folder}: tensor {name} is stored as {dtype}; convert the weights to "
                "float32, float16 or bfloat16"
            )
    return shapes


def _check_names(
    folder: Path,
    architecture: Architecture,
    stored: dict[str, Any],
    expected: dict[str, tuple[int, ...]],
    ignored: set[str],
) -> None:
    family = architecture.family
    missing = [name for name in expected if name not in stored]
    if missing:
        head = family.tensors["head"].template
        tied = "; if it is tied, set tie_word_embeddings to true"
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} of "
            f"{len(expected)} are){tied if missing == [head] else ''}"
        )
    unknown = [
        name
        for name in stored
        if not (name in expected or name in ignored)
        and not name.endswith(family.ignored_tensors)
        and not name.startswith(family.copied_tensors)
    ]
    if unknown:
        raise InputError(
            f"{folder}: tensor {unknown[0]} is not part of a {family.model_type} model "
            f"with {architecture.num_layers} layers (unknown: {len(unknown)}); check "
            "config.json"
        )


def _check_tied_head(folder: Path, model: AnyModel, stored: dict[str, Any]) -> None:
    """Checks that a stored LM head equals the embedding to which it is tied."""
    tensors = model.architecture.family.tensors
    head, embed = (tensors[name].template for name in ("head", "embed"))
    tied = isinstance(model, Model) and model.architecture.tie_word_embeddings
    if (
        tied
        and head in stored
        and not np.array_equal(stored[head][:], stored[embed][:])
    ):
        raise InputError(
            f"{folder}: tensor {head} differs from {embed}, but config.json says "
            "tie_word_embeddings; set it to false"
        )


def load_leaf(
    folder: Path, stored: dict[str, Any], array: StoredArray, leaf: Any
) -> jax.Array:
    """An array of the parameters, in the shape, dtype and layout of `leaf`."""
    tensors, stacked, pieces = array.tensors, array.name.stacked, {}

    def read(tensor: str, index: Sequence[slice], into: np.ndarray) -> None:
        beat(f"reading {folder}: {tensor}")
        # Some rows at a time, so that no second copy of a large tensor is in memory.
        axis = array.name.inputs or 0
        low, high, _ = index[axis].indices(array.inner[axis])
        step = max(1, ROWS_BYTES * (high - low) // max(into.nbytes, 1))
        for at in range(low, high, step):
            rows = slice(at, min(at + step, high))
            part = (*index[:axis], rows, *index[axis + 1 :])
            values = array.read(stored[tensor], part).astype(leaf.dtype, copy=False)
            if not np.isfinite(values).all():
                raise InputError(
                    f"{folder}: tensor {tensor} holds NaN or infinite values"
                )
            into[(slice(None),) * axis + (slice(at - low, rows.stop - low),)] = values

    def read_all(index: Sequence[slice]) -> np.ndarray:
        names, inner = tensors[(*index[:stacked], ...)], index[stacked:]
        sizes = [len(range(n)[s]) for s, n in zip(inner, array.inner, strict=True)]
        values = _aligned((*names.shape, *sizes), leaf.dtype)
        for place, tensor in np.ndenumerate(names):
            read(tensor, inner, values[place])
        return values

    def piece(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n) for s, n in zip(index, leaf.shape, strict=True))
        if bounds not in pieces:  # read once for all devices with the same shard
            pieces[bounds] = read_all(index)
        return pieces[bounds]

    if leaf.sharding is None:
        return jnp.asarray(piece((slice(None),) * len(leaf.shape)))
    sharding = NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
    return jax.make_array_from_callback(leaf.shape, sharding, piece)


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialized array that JAX on CPU takes over without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


# --- writing


def _config_fields(
    model: AnyModel, source: Path | None, padding: Padding | None
) -> dict[str, Any]:
    architecture = model.architecture
    fields = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if source is not None:
        if not source.is_dir():
            raise InputError(f"{source}: no such folder to copy the tokenizer from")
        if (source / "config.json").exists():
            harmless = {*HARMLESS, *architecture.family.harmless} - {"dtype"}
            copied = read_json(source / "config.json").items()
            fields |= {name: value for name, value in copied if name in harmless}
    fields |= architecture_to_fields(architecture)
    if isinstance(model, RewardModel):
        fields |= head_to_fields(architecture, model.head)
        fields |= {"pad_token_id": padding.id if padding else None}
    return fields


def move_into_place(temporary: Path, folder: Path) -> None:
    """Moves a written model to `folder`, and removes other weights from it.

    Its other files stay as they are.  A folder that is new or empty gets all files at
    once.
    """
    if not folder.exists() or not any(folder.iterdir()):
        temporary.rename(folder)
        return
    written = {path.name for path in temporary.iterdir()}
    for name in sorted(written):
        (temporary / name).replace(folder / name)
    # Otherwise, weights of an earlier save under other names would be read instead.
    for path in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if path.name not in written:
            path.unlink(missing_ok=True)
