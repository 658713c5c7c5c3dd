"""The fields of config.json about sliding attention, shared by several families."""

from collections.abc import Sequence
from typing import Any

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture
from jaxpref.models.config_json import ConfigFields

TYPES = {"full_attention": False, "sliding_attention": True}
"""Whether layers of a type in `layer_types` have sliding attention."""


def read_window(fields: ConfigFields, default: int | None = None) -> int | None:
    """`sliding_window`; null means none, and a missing field the default."""
    if fields.get("sliding_window") is None:
        return None if "sliding_window" in fields.values else default
    return fields.read("sliding_window", int)


def read_layer_types(fields: ConfigFields, default: Sequence[bool]) -> tuple[bool, ...]:
    """Whether each layer has sliding attention, by `layer_types`.

    Raises:
        InputError: if a layer has another type than full or sliding attention.
    """
    types = fields.get("layer_types")
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or not set(map(str, types)) <= set(TYPES):
        raise InputError(
            f"{fields.source}: field layer_types is {types!r}; supported: lists of "
            f"{' and '.join(TYPES)}"
        )
    return tuple(TYPES[name] for name in types)


def window_of(window: int | None, layers: Sequence[bool]) -> dict[str, Any]:
    """The arguments of `Architecture` for a window in some of the layers."""
    if window is None or not any(layers):
        return {"sliding_window": None, "sliding_layers": None}
    some = None if all(layers) else tuple(layers)
    return {"sliding_window": window, "sliding_layers": some}


def layer_types(architecture: Architecture) -> list[str]:
    """`layer_types` of an architecture, for its config.json."""
    layers = architecture.sliding_layers
    if layers is None:
        layers = (architecture.sliding_window is not None,) * architecture.num_layers
    return ["sliding_attention" if sliding else "full_attention" for sliding in layers]
