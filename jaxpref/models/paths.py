"""Parameters by path: "layers.query" instead of nested dicts."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxpref.models.quantized import Quantized


def by_path(tree: Any) -> dict[str, Any]:
    """What nested dicts hold, in tree order; quantized matrices are not split."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, Quantized)
    )
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `by_path`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *outer, last = path.split(".")
        inside = tree
        for name in outer:
            inside = inside.setdefault(name, {})
        inside[last] = leaf
    return tree
