"""Parameters that stay in a model folder until `folder.save` writes them to another.

So a model is exported whose frozen parameters are in memory in another dtype, or not at
all: what was not trained is copied without rounding, one layer's matrix at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref.models.families.family import StoredArray
from jaxpref.models.folder import (
    load_leaf,
    match_tensors,
    open_model,
    stored_arrays,
)


class PerLayer:
    """An array [L, ...] of parameters whose layers are made when they are asked for."""

    def __init__(self, shape: tuple[int, ...], layer: Callable[..., Any]):
        """`layer(i)` is the part of layer i; of expert e, `layer(i, e)`."""
        self.shape, self._layer = shape, layer

    def __getitem__(self, index: int | tuple[int, ...]) -> Any:
        return self._layer(*(index if isinstance(index, tuple) else (index,)))


class StoredLeaf(PerLayer):
    """A parameter in a folder, in float32; reads one layer, or all if converted."""

    def __init__(self, folder: Path, stored: dict[str, Any], array: StoredArray):
        """`stored` are the folder's tensors, among them those of the parameter."""

        def read(array: StoredArray) -> np.ndarray:
            leaf = jax.ShapeDtypeStruct(array.shape, jnp.float32)
            return np.asarray(load_leaf(folder, stored, array, leaf))

        super().__init__(array.shape, lambda *index: read(array.at(*index)))
        self._whole = lambda: read(array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return self._whole().astype(dtype or np.float32)


def stored_params(folder: Path, model: Any) -> dict[str, StoredLeaf]:
    """The parameters in a folder by path, which are read when they are used.

    Raises:
        InputError: if they are not those of the model; a reward model's head may be
            missing.
    """
    family = model.architecture.family
    stored = open_model(folder, family)
    shapes = match_tensors(folder, model, stored, new_head=True)
    arrays = stored_arrays(family, shapes).items()
    return {path: StoredLeaf(folder, stored, array) for path, array in arrays}


def gathered(leaf: Any) -> np.ndarray:
    """A whole array on the host, on every process."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and not leaf.is_fully_addressable:
        leaf = jax.device_put(leaf, NamedSharding(sharding.mesh, P()))
    return np.asarray(leaf)
