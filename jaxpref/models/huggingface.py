"""Hugging Face model folders (config.json + safetensors), read and written.

Adding a family is a name table here and, where its mathematics differs, a flag in
`ModelConfig`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref.errors import InputError
from jaxpref.models import tensor_file
from jaxpref.models.config import ModelConfig, check_mesh
from jaxpref.models.functional import Model, Params


@dataclasses.dataclass(frozen=True)
class Name:
    """Where one of our arrays lies in a folder.

    `inputs` is how many of its leading axes (behind the layer axis) are the inputs of a
    matrix.  The folder holds `[outputs, inputs]`, each flattened; 0 is stored as it is.
    """

    template: str
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer axis, and the folder one tensor a layer."""
        return "{}" in self.template

    def tensors(self, shape) -> list[str]:
        """The names of the tensors that make up our array of this shape."""
        return [self.template.format(i) for i in range(shape[0] if self.stacked else 1)]

    def stored_shape(self, shape) -> tuple[int, ...]:
        """The shape of each of them."""
        shape, n = tuple(shape[1:] if self.stacked else shape), self.inputs
        return (math.prod(shape[n:]), math.prod(shape[:n])) if n else shape


LLAMA = {
    "embed": Name("model.embed_tokens.weight"),
    "layers.attention_norm": Name("model.layers.{}.input_layernorm.weight"),
    "layers.query": Name("model.layers.{}.self_attn.q_proj.weight", 1),
    "layers.key": Name("model.layers.{}.self_attn.k_proj.weight", 1),
    "layers.value": Name("model.layers.{}.self_attn.v_proj.weight", 1),
    "layers.output": Name("model.layers.{}.self_attn.o_proj.weight", 2),
    "layers.mlp_norm": Name("model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate": Name("model.layers.{}.mlp.gate_proj.weight", 1),
    "layers.up": Name("model.layers.{}.mlp.up_proj.weight", 1),
    "layers.down": Name("model.layers.{}.mlp.down_proj.weight", 1),
    "norm": Name("model.norm.weight"),
    "head": Name("lm_head.weight", 1),
}

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

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
    return ModelConfig.from_hf_json(_read_json(path), path)


def load_params(folder: str | Path, model: Model) -> Params:
    """The weights of a folder, cast to the model's `param_dtype`.

    Under a mesh (`jax.set_mesh`) every process reads only the parts that its own
    devices hold.  A tied model's folder may hold `lm_head.weight` if it equals the
    embedding; stored rotary frequencies are ignored.

    Raises:
        InputError: a tensor is missing, extra, of another shape or dtype, or holds a
            value that is not finite; or the mesh does not divide the model's sizes.
    """
    folder = Path(folder)
    check_mesh(model.config)
    stored = _stored(folder)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    expected = {}

    def expect(name, leaf):
        stored_shape = name.stored_shape(leaf.shape)
        expected.update(dict.fromkeys(name.tensors(leaf.shape), stored_shape))

    _map_leaves(expect, shapes)
    _check(folder, model, stored, expected)
    return _map_leaves(functools.partial(_load_leaf, folder, stored), shapes)


def save(
    folder: str | Path,
    model: Model,
    params: Params,
    source_folder: str | Path | None = None,
    dtype: str | None = None,
    *,
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
        max_file_bytes: weights beyond this size are split over several files.

    Raises:
        InputError: the folder cannot be written, or a weight is not finite in `dtype`.
    """
    folder = Path(folder).resolve()
    dtype = np.dtype(jnp.dtype(dtype or model.config.param_dtype))
    if dtype not in tensor_file.NAMES:
        raise InputError(f"{folder}: weights are saved in {list(tensor_file.DTYPES)}")
    fields = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if source_folder is not None:
        source = Path(source_folder)
        if not source.is_dir():
            raise InputError(f"{source}: no such folder to copy the tokenizer from")
        if (source / "config.json").exists():
            fields |= _read_json(source / "config.json")
            for older_or_newer_name in ("dtype", "rope_parameters"):
                fields.pop(older_or_newer_name, None)
    fields |= model.config.to_hf_json() | {"torch_dtype": dtype.name}

    temporary = folder.parent / f".{folder.name}.partial"
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _write_weights(temporary if writes else None, params, dtype, max_file_bytes)
        if writes:
            _write_json(temporary / "config.json", fields)
            for name in TOKENIZER_FILES if source_folder is not None else ():
                if (source / name).exists():
                    shutil.copyfile(source / name, temporary / name)
            _move_into_place(temporary, folder)
    except OSError as error:
        raise InputError(
            f"{folder}: the model cannot be written ({error.strerror}); free some "
            "space or choose another folder"
        ) from None
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def _map_leaves(function, tree):
    """`function(name, leaf)` for each leaf of parameters."""
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(LLAMA[key(path)], leaf), tree
    )


# --- reading


def _read_json(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; give the folder of a Hugging Face model"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not a JSON object")
    return fields


def _stored(folder: Path) -> dict[str, np.ndarray]:
    if (folder / WEIGHTS).exists():
        return tensor_file.read(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise InputError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; only safetensors are read, "
            "so convert other weights first"
        )
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in index.values()
    ):
        raise InputError(
            f"{folder / INDEX}: weight_map is not a table of tensor and file names"
        )
    stored = {}
    for file in sorted(set(index.values())):
        stored |= tensor_file.read(folder / file)
    for name, file in index.items():
        if name not in stored:
            raise InputError(f"{folder / file}: tensor {name} is indexed, but missing")
    return stored


def _check(folder, model, stored, expected):
    head, embed = LLAMA["head"].template, LLAMA["embed"].template
    extra = [
        name
        for name in stored
        if name not in expected and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [name for name in expected if name not in stored]
    if missing:
        hint = "; set tie_word_embeddings if it is tied" if missing == [head] else ""
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} of "
            f"{len(expected)} are){hint}"
        )
    if extra == [head] and model.config.tie_word_embeddings:
        if not np.array_equal(stored[head], stored[embed]):
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
        if stored[name].shape != shape:
            raise InputError(
                f"{folder}: tensor {name} has shape {list(stored[name].shape)}, but "
                f"config.json asks for {list(shape)}; the two do not belong together"
            )


def _load_leaf(folder, stored, name: Name, leaf):
    tensors, pieces = name.tensors(leaf.shape), {}
    inner_shape = leaf.shape[1:] if name.stacked else leaf.shape

    def read(tensor, index):
        # Transposing and splitting an axis are views: only `index` is read from disk.
        view = stored[tensor].T.reshape(inner_shape) if name.inputs else stored[tensor]
        values = view[index].astype(leaf.dtype)
        if not np.isfinite(values).all():
            raise InputError(f"{folder}: tensor {tensor} holds NaN or infinite values")
        return values

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


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path | None, params, dtype, max_file_bytes):
    """Writes the weights into `folder`, or with None only helps to gather them."""
    tensors = []  # (name, shape, how to get it), in the order in which they are written

    def add(name, leaf):
        shape = name.stored_shape(leaf.shape)
        for layer, tensor in enumerate(name.tensors(leaf.shape)):
            tensors.append(
                (tensor, shape, functools.partial(_gather, name, leaf, layer))
            )

    _map_leaves(add, params)
    files, size = [[]], 0
    for tensor in tensors:
        nbytes = math.prod(tensor[1]) * dtype.itemsize
        if size + nbytes > max_file_bytes and files[-1]:
            files, size = [*files, []], 0
        files[-1].append(tensor)
        size += nbytes

    index = {}
    for i, tensors in enumerate(files):
        file = WEIGHTS
        if len(files) > 1:
            file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        layout = {tensor: shape for tensor, shape, _ in tensors}
        tensor_file.write(
            None if folder is None else folder / file,
            layout,
            dtype,
            (gather(tensor, dtype) for tensor, _, gather in tensors),
        )
        index |= dict.fromkeys(layout, file)
    if len(files) > 1 and folder is not None:
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        metadata = {"total_size": total * dtype.itemsize}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": index})


def _gather(name: Name, leaf, layer, tensor, dtype) -> np.ndarray:
    value = leaf[layer] if name.stacked else leaf
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = jax.device_put(value, NamedSharding(value.sharding.mesh, P()))
    with np.errstate(over="ignore"):
        value = np.asarray(value).astype(dtype)
    if not np.isfinite(value).all():
        raise InputError(f"tensor {tensor} is not finite in {dtype}; nothing was saved")
    if name.inputs == 0:
        return value
    return value.reshape(math.prod(value.shape[: name.inputs]), -1).T


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
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
