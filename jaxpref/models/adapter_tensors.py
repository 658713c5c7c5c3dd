"""Where the factors of adapters are in a folder of `peft`.

If a tensor of the model holds n matrices, each of which has factors a and b of rank r
here, `peft` has one pair of factors for all of them.  It has rank n r: the a side by
side, and the b as blocks of a matrix that is else zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.models.families.family import Family, StoredArray, join
from jaxpref.models.lora import Lora, factor_names
from jaxpref.models.paths import by_path

PREFIX = "base_model.model."
"""What `peft` puts before the names of a model's tensors."""


def module_arrays(family: Family, tree: Any) -> dict[str, StoredArray]:
    """Where all arrays of a model are stored, by path, named as `peft` names them."""

    def named(array: StoredArray) -> StoredArray:
        template = family.module_name(array.name.template)
        name = dataclasses.replace(array.name, template=template)
        return dataclasses.replace(array, name=name)

    shapes = {path: x.shape for path, x in by_path(tree).items()}
    return {path: named(array) for path, array in family.stored(shapes).items()}


def prefixed(array: StoredArray, prefix: str = PREFIX) -> StoredArray:
    """Where an array of the model itself is stored."""
    name = dataclasses.replace(array.name, template=prefix + array.name.template)
    return dataclasses.replace(array, name=name)


def pairs(array: StoredArray) -> list[tuple[str, str]]:
    """The tensors of a matrix's two factors, layer by layer."""
    a, b = (name.template for name in factor_names(array.name))
    return [(a.format(layer), b.format(layer)) for layer in range(array.shape[0])]


def magnitude(array: StoredArray) -> StoredArray:
    """Where the norms m [L, outputs] of a matrix are stored, by DoRA."""
    first, _ = factor_names(array.name)
    name = dataclasses.replace(
        array.name,
        template=first.template.replace(".lora_A.weight", ".lora_magnitude_vector"),
        inputs=0,
        input_major=False,
    )
    shape = (array.shape[0], *array.inner[array.name.inputs or 0 :])
    return dataclasses.replace(array, name=name, shape=shape)


def second_factor(array: StoredArray, rank: int) -> StoredArray:
    """Where the factor b [rank, outputs] of one layer's matrix is stored."""
    _, name = factor_names(dataclasses.replace(array.name, template="layer.weight"))
    shape = (rank, *array.inner[array.name.inputs or 0 :])
    return dataclasses.replace(array, name=name, shape=shape)


def read_second(array: StoredArray, b: np.ndarray) -> np.ndarray:
    """The part [rank, outputs] of a stored factor that belongs to a matrix."""
    part = second_factor(array, b.shape[1])
    return part.read(b, (slice(None),) * len(part.shape)).reshape(b.shape[1], -1)


def own_ranks(path: str, array: StoredArray, factors: Sequence[np.ndarray]) -> slice:
    """The ranks of a shared pair of factors that belong to one matrix alone.

    They are found if `stored_factors` made them; otherwise these are all ranks.

    Args:
        path: the matrix.
        array: where it is stored.
        factors: the stored factors b of all layers.
    """
    parts = array.name.parts
    ranks = {b.shape[1] for b in factors}
    if not parts or len(ranks) > 1 or min(ranks) % len(parts):
        return slice(None)
    size = min(ranks) // len(parts)
    start = parts.index(path) * size
    own = slice(start, start + size)
    used = np.any([read_second(array, b).any(1) for b in factors], 0)
    return own if used.any() and not np.delete(used, own).any() else slice(None)


def together(lora: Lora, arrays: Mapping[str, StoredArray]) -> list[tuple[str, ...]]:
    """The adapted matrices, those in the same tensor together and in its order."""
    found = {}
    for path in lora.adapted:
        name = arrays[path].name
        found[name.template] = name.parts or (path,)
        assert set(found[name.template]) <= set(lora.adapted), path
    return list(found.values())


def stored_factors(
    lora: Lora, arrays: Mapping[str, StoredArray], leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of all adapters, from `leaves` by "path.a", "path.b" and "path.m"."""
    tensors = {}
    for paths in together(lora, arrays):
        of_a, of_b = factor_names(arrays[paths[0]].name)
        for layer in range(arrays[paths[0]].shape[0]):
            first, second = [], []
            for i, path in enumerate(paths):
                a, b = (leaves[f"{path}.{factor}"][layer] for factor in "ab")
                part = second_factor(arrays[path], lora.rank * len(paths))
                block = np.zeros(part.shape, b.dtype)
                block[i * lora.rank : (i + 1) * lora.rank] = b
                first.append(a.reshape(-1, lora.rank))
                second.append((part, block))
            tensors[of_a.template.format(layer)] = np.concatenate(first, 1).T
            tensors[of_b.template.format(layer)] = join(second)
            if lora.dora:
                norms = [magnitude(arrays[path]).at(layer) for path in paths]
                values = (leaves[f"{path}.m"][layer] for path in paths)
                name = norms[0].name.template
                tensors[name] = join(list(zip(norms, values, strict=True)))
    return tensors
