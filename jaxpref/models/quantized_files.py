"""Reading a model folder into quantized matrices, one layer's matrix at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.families.family import Family, StoredArray
from jaxpref.models.folder import (
    load_params,
    match_tensors,
    open_model,
    stored_arrays,
)
from jaxpref.models.lora import matrices
from jaxpref.models.paths import by_path, nested
from jaxpref.models.quantized import (
    Quantization,
    Quantized,
    block_size,
    drawn,
    encoded,
    shapes_of,
)
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.memory import check_arrays


def load_quantized(
    folder: Path,
    model: Any,
    quantization: Quantization | None,
    head_key: PRNGKeyArray | None = None,
    *,
    only: Callable[[str], bool] = lambda path: True,
) -> Any:
    """`load_params` with the matrices of the layers quantized, or with none.

    The codes are those of the stored values, whatever the dtype of the model and the
    mesh.  A process reads the blocks of its own devices, one layer's matrix at a time.

    Raises:
        InputError: as `load_params`, or if a matrix cannot be quantized.
    """
    if quantization is None:
        return load_params(folder, model, head_key, only=only)
    family = model.architecture.family
    names = {path: name for path, name in matrices(family).items() if only(path)}
    rest = load_params(
        folder, model, head_key, only=lambda path: only(path) and path not in names
    )
    stored = open_model(folder, family)
    shapes = match_tensors(folder, model, stored, head_key is not None)
    arrays, leaves = stored_arrays(family, shapes), by_path(shapes)
    wanted = {
        path: shapes_of(leaves[path], quantization, name.inputs or 0, path)
        for path, name in names.items()
        if path in leaves
    }
    check_arrays(f"{folder}: the quantized weights", wanted)
    found = {path: _load(folder, stored, arrays[path], x) for path, x in wanted.items()}
    return nested(by_path(rest) | found)


def quantized_at_random(
    params: Any, family: Family, quantization: Quantization | None, key: PRNGKeyArray
) -> Any:
    """Parameters with random quantized matrices, in the layouts of the given ones."""
    if quantization is None:
        return params
    leaves = by_path(params)
    for n, (path, name) in enumerate(matrices(family).items()):
        if path in leaves:
            like = jax.eval_shape(lambda x: x, leaves[path])
            shapes = shapes_of(like, quantization, name.inputs or 0, path)
            leaves[path] = drawn(shapes, jax.random.fold_in(key, n), 0.05)
    return nested(leaves)


def _load(
    folder: Path, stored: dict[str, Any], array: StoredArray, shapes: Quantized
) -> Quantized:
    axis = (array.name.inputs or 0) - 1
    kind, size = shapes.kind, block_size(array.inner[axis])
    codes, scales = shapes.codes, shapes.scales
    within = codes.shape[axis + 2]  # bytes of a block
    made: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def of_layer(layer: int, bounds: tuple) -> tuple[np.ndarray, np.ndarray]:
        tensor = array.tensors[layer]
        beat(f"reading {folder}: {tensor}")
        index = [slice(*pair) for pair in bounds]
        index[axis] = slice(*(size * at for at in bounds[axis]))
        values = array.read(stored[tensor], index).astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"{folder}: tensor {tensor} holds NaN or infinite values")
        return encoded(values, kind, axis)

    def blocks(layers: slice, bounds: tuple) -> tuple[np.ndarray, np.ndarray]:
        """Whole blocks of some layers; read once for codes and scales."""
        rows = range(*layers.indices(array.shape[0]))
        if (bounds, rows) not in made:
            parts = [of_layer(layer, bounds) for layer in rows]
            first, second = zip(*parts, strict=True)
            made[bounds, rows] = np.stack(first), np.stack(second)
        return made[bounds, rows]

    def of_codes(index: Any) -> np.ndarray:
        cut = index[axis + 2]
        part = (*index[: axis + 2], *index[axis + 3 :])
        found = blocks(part[0], _bounds(part[1:], scales.shape[1:]))[0]
        rows = range(within)[cut]
        return found.take(rows, axis + 2) if len(rows) < within else found

    def of_scales(index: Any) -> np.ndarray:
        return blocks(index[0], _bounds(index[1:], scales.shape[1:]))[1]

    return Quantized(
        _placed(codes, of_codes),
        _placed(scales, of_scales),
        kind,
        shapes.outputs,
        shapes.layout,
    )


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _placed(leaf: Any, piece: Callable[[Any], np.ndarray]) -> jax.Array:
    if leaf.sharding is None:
        return jnp.asarray(piece((slice(None),) * len(leaf.shape)))
    sharding = NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
    return jax.make_array_from_callback(leaf.shape, sharding, piece)
