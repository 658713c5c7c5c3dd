"""Hugging Face model folders (config.json + safetensors), read and written.

A folder holds a language model (`AutoModelForCausalLM`) or a reward model
(`AutoModelForSequenceClassification` with one label); which one, its config.json says.
Adding a family is a table in `huggingface_names` and, where its mathematics differs, a
flag in `ModelConfig`.
"""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpref.errors import InputError
from jaxpref.models.config import ModelConfig, check_mesh
from jaxpref.models.functional import Model, Params
from jaxpref.models.huggingface_config import config_from_hf, config_to_hf, read_json
from jaxpref.models.huggingface_names import LLAMA, Name
from jaxpref.models.reward import Padding, RewardModel
from jaxpref.runtime.heartbeat import beat

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What weights may be stored as: the format's names and numpy's."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

REWARD_FIELDS = {
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}
"""What config.json says of a reward model: one label, whose logit is the score."""

TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Copied unchanged from the source folder into a saved one."""


def load_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a folder's config.json; parameters and compute in float32.

    Raises:
        InputError: no readable config.json, or a field that this model cannot honour.
    """
    path = Path(folder) / "config.json"
    return config_from_hf(read_json(path), path)


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder's config.json is that of a sequence classifier.

    Raises:
        InputError: no readable config.json.
    """
    architectures = read_json(Path(folder) / "config.json").get("architectures")
    return any(str(a).endswith("SequenceClassification") for a in architectures or ())


def load_params(
    folder: str | Path,
    model: Model | RewardModel,
    head_key: jax.Array | None = None,
) -> Params:
    """The weights of a folder, cast to the model's `param_dtype`.

    Under a mesh (`jax.set_mesh`) every process reads only the parts that its own
    devices hold.  A tied model's folder may hold `lm_head.weight` if it equals the
    embedding; stored rotary frequencies are ignored.

    Args:
        folder: the folder.
        model: a language or a reward model, as the folder holds.
        head_key: a random key.  With it a reward model takes the backbone of a language
            model's folder, and a new head of its own; read only there.

    Raises:
        InputError: a tensor is missing, extra, of another shape or dtype, or holds a
            value that is not finite; or the mesh does not divide the model's sizes.
    """
    folder = Path(folder)
    check_mesh(model.config)
    stored = _stored(folder)
    shapes, drawn = jax.eval_shape(model.init, jax.random.key(0)), {}
    without_score = "score" in shapes and LLAMA["score"].template not in stored
    if head_key is not None and without_score:
        stored.pop(LLAMA["head"].template, None)
        del shapes["score"]
        drawn = {"score": jax.jit(model.new_score)(head_key)}
    _check(folder, model, stored, shapes)
    leaves = [_load_leaf(folder, stored, *entry) for entry in _named_leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves) | drawn


def save(
    folder: str | Path,
    model: Model | RewardModel,
    params: Params,
    source_folder: str | Path | None = None,
    dtype: str | None = None,
    *,
    padding: Padding | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors that `transformers` loads.

    Everything is written under a temporary name beside `folder` and then renamed, so a
    crash leaves no half-written model.  Sharded parameters are gathered one layer's
    matrix at a time.  With several processes all must call it; the first one writes.

    Args:
        folder: the folder to write; other files in an existing one stay as they are.
        model: the model.
        params: its parameters, sharded or not.
        source_folder: where the model came from: its tokenizer files are copied, and
            fields of its config.json that the model does not use (token ids) are kept.
        dtype: "float32", "float16" or "bfloat16"; by default that of the parameters.
        padding: from `reward.padding_of`; a reward model's config.json and tokenizer
            name it, a language model's stay as they are.  Without it `transformers`
            refuses to score more than one sequence at a time.
        max_file_bytes: weights beyond this size are split over several files; one
            file's weights are held in host memory at a time.

    Raises:
        InputError: the folder cannot be written, or a weight is not finite in `dtype`.
    """
    folder = Path(folder).resolve()
    dtype = np.dtype(jnp.dtype(dtype or model.config.param_dtype))
    if dtype.name not in DTYPES.values():
        raise InputError(
            f"{folder}: weights are saved in {', '.join(DTYPES.values())}, not {dtype}"
        )
    fields = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if source_folder is not None:
        source = Path(source_folder)
        if not source.is_dir():
            raise InputError(f"{source}: no such folder to copy the tokenizer from")
        if (source / "config.json").exists():
            fields |= read_json(source / "config.json")
            for older_or_newer_name in ("dtype", "rope_parameters"):
                fields.pop(older_or_newer_name, None)
    fields |= config_to_hf(model.config) | {"torch_dtype": dtype.name}
    if isinstance(model, RewardModel):
        fields |= REWARD_FIELDS | {"pad_token_id": padding.id if padding else None}
    else:
        padding = None

    temporary = folder.parent / f".{folder.name}.partial"
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_json(temporary / "config.json", fields)
        _write_weights(temporary if writes else None, params, dtype, max_file_bytes)
        if writes:
            for name in TOKENIZER_FILES if source_folder is not None else ():
                if (source / name).exists():
                    shutil.copyfile(source / name, temporary / name)
            if padding is not None:
                _name_padding(temporary, padding)
            _move_into_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: the model cannot be written ({reason}); free some space or "
            "choose another folder"
        ) from None
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def _named_leaves(tree) -> list[tuple[Name, jax.Array]]:
    """The leaves of parameters in the tree's order, and where each lies in a folder."""
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(LLAMA[key(path)], leaf) for path, leaf in leaves]


# --- reading


def _open(path: Path) -> dict:
    """The tensors of a file by name; indexing one reads that part of it from disk."""
    try:
        file = safe_open(path, framework="np")
        tensors = {name: file.get_slice(name) for name in file.keys()}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the folder is incomplete, copy it again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error}); check its rights"
        ) from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); copy or download it "
            "again"
        ) from None
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in DTYPES:
            raise InputError(
                f"{path}: tensor {name} is stored as {tensor.get_dtype()}; convert the "
                "weights to float32, float16 or bfloat16"
            )
    return tensors


def _stored(folder: Path) -> dict:
    """The tensors of every file of a folder by name."""
    if (folder / WEIGHTS).exists():
        return _open(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise InputError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; only safetensors are read, "
            "so convert other weights first"
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in index.values()
    ):
        raise InputError(
            f"{folder / INDEX}: weight_map is not a table of tensor and file names"
        )
    stored = {}
    for file in sorted(set(index.values())):
        stored |= _open(folder / file)
    for name, file in index.items():
        if name not in stored:
            raise InputError(f"{folder / file}: tensor {name} is indexed, but missing")
    return stored


def _check(folder, model, stored, shapes):
    expected = {}
    for name, leaf in _named_leaves(shapes):
        stored_shape = name.stored_shape(leaf.shape)
        expected |= dict.fromkeys(name.tensors(leaf.shape), stored_shape)
    head, embed = LLAMA["head"].template, LLAMA["embed"].template
    score = LLAMA["score"].template
    if score in stored and score not in expected:
        raise InputError(
            f"{folder}: holds a reward model (tensor {score}), which has no LM head; "
            "give a language model, or train this one with a loss of rewards"
        )
    if score in expected and score not in stored:
        raise InputError(
            f"{folder}: holds no reward model (tensor {score} is missing); give one, "
            "such as OUT/export of a run with --loss bradley_terry"
        )
    extra = [name for name in stored if name not in expected]
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    missing = [name for name in expected if name not in stored]
    if missing:
        hint = "; set tie_word_embeddings if it is tied" if missing == [head] else ""
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} of "
            f"{len(expected)} are){hint}"
        )
    if extra == [head] and model.config.tie_word_embeddings:
        if not np.array_equal(stored[head][:], stored[embed][:]):
            raise InputError(
                f"{folder}: tensor {head} differs from {embed}, but config.json says "
                "tie_word_embeddings; set it to false"
            )
    elif extra:
        raise InputError(
            f"{folder}: tensor {extra[0]} is not part of a llama model with "
            f"{model.config.num_layers} layers ({len(extra)} such); check config.json"
        )
    for name, shape in expected.items():
        found = stored[name].get_shape()
        if found != list(shape):
            raise InputError(
                f"{folder}: tensor {name} has shape {found}, but config.json asks for "
                f"{list(shape)}; the two do not belong together"
            )


def _load_leaf(folder, stored, name: Name, leaf):
    tensors, pieces = name.tensors(leaf.shape), {}
    inner_shape = leaf.shape[1:] if name.stacked else leaf.shape

    def read(tensor, index):
        beat(f"reading {folder}: {tensor}")
        values = stored[tensor][name.stored_index(inner_shape, index)]
        values = values.astype(leaf.dtype)
        if not np.isfinite(values).all():
            raise InputError(f"{folder}: tensor {tensor} holds NaN or infinite values")
        if name.inputs == 0:
            return values
        sizes = [len(range(n)[s]) for s, n in zip(index, inner_shape, strict=True)]
        return values.T.reshape(sizes)

    def piece(index):
        bounds = tuple(s.indices(n) for s, n in zip(index, leaf.shape, strict=True))
        if bounds not in pieces:  # devices that hold a copy share one reading
            if name.stacked:
                layers = [read(tensor, index[1:]) for tensor in tensors[index[0]]]
                pieces[bounds] = np.stack(layers)
            else:
                pieces[bounds] = read(tensors[0], index)
        return pieces[bounds]

    if leaf.sharding is None:
        return jnp.asarray(piece((slice(None),) * len(leaf.shape)))
    sharding = NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
    return jax.make_array_from_callback(leaf.shape, sharding, piece)


# --- writing


def _name_padding(folder: Path, padding: Padding) -> None:
    """Has the tokenizer pad with it; files that say so already stay as they are."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            fields = read_json(path)
            written = name == "tokenizer_config.json" or "pad_token" in fields
            if written and _text(fields.get("pad_token")) != padding.token:
                _write_json(path, fields | {"pad_token": padding.token})


def _text(token) -> str | None:
    """A special token's text, which older files hold in an object."""
    return token["content"] if isinstance(token, dict) else token


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path | None, params, dtype, max_file_bytes):
    """Writes the weights into `folder`, or with None only helps to gather them."""
    files, size = [[]], 0  # of each file the arguments of _gather, in writing order
    for name, leaf in _named_leaves(params):
        nbytes = math.prod(name.stored_shape(leaf.shape)) * dtype.itemsize
        for layer, tensor in enumerate(name.tensors(leaf.shape)):
            if size + nbytes > max_file_bytes and files[-1]:
                files, size = [*files, []], 0
            files[-1].append((tensor, name, leaf, layer))
            size += nbytes

    index = {}
    for i, tensors in enumerate(files):
        file = WEIGHTS
        if len(files) > 1:
            file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        values = {entry[0]: _gather(*entry, dtype) for entry in tensors}
        index |= dict.fromkeys(values, file)
        if folder is not None:
            save_file(values, folder / file, metadata={"format": "pt"})
            # The library makes files that only their owner can read.
            shutil.copymode(folder / "config.json", folder / file)
        del values  # before the next file's are gathered
    if len(files) > 1 and folder is not None:
        total = dtype.itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
        table = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / INDEX, table)


def _gather(tensor: str, name: Name, leaf, layer, dtype) -> np.ndarray:
    beat(f"exporting {tensor}")
    value = leaf[layer] if name.stacked else leaf
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = jax.device_put(value, NamedSharding(value.sharding.mesh, P()))
    with np.errstate(over="ignore"):
        value = np.asarray(value).astype(dtype)
    if not np.isfinite(value).all():
        raise InputError(f"tensor {tensor} is not finite in {dtype}; nothing was saved")
    if name.inputs:
        value = value.reshape(math.prod(value.shape[: name.inputs]), -1).T
    return np.ascontiguousarray(value)  # or the library saves the wrong order


def _move_into_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    written = {path.name for path in temporary.iterdir()}
    for name in sorted(written):
        (temporary / name).replace(folder / name)
    # Weights of an earlier save under other names would be read in place of ours.
    for path in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if path.name not in written:
            path.unlink(missing_ok=True)
