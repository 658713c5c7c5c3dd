"""The rotary fields of config.json, shared by several families."""

from typing import Any

from jaxpref.errors import InputError
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.rotary import RopeScaling


def read_rope(
    fields: ConfigFields, context: int, default_theta: float = 10000.0
) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling.

    As transformers 5 writes them (`rope_parameters`), or as older versions do
    (`rope_theta`, `rope_scaling`).

    Args:
        fields: the fields of the config.json.
        context: the default of `original_max_position_embeddings`.
        default_theta: the base if the file has none.

    Raises:
        InputError: if a field is malformed, or has an unsupported kind of scaling.
    """
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    nested = old or new or {}
    if not isinstance(nested, dict):
        raise InputError(
            f"{fields.source}: field rope_scaling is {nested!r}, not an object"
        )
    outer = {
        name: value
        for name in ("rope_theta", "partial_rotary_factor")
        if (value := fields.get(name)) is not None
    }
    rope = ConfigFields(outer | nested, f"{fields.source}: rotary positions")
    theta = rope.read("rope_theta", float, default_theta)
    rope.require("partial_rotary_factor", 1)
    older, newer = rope.get("type"), rope.get("rope_type")
    kind = newer or older or "default"
    scaling = None if kind == "default" else _scaling(rope, kind, context)
    # Only some kinds use it, but it is written for others too.
    rope.check_all_read(("factor", "original_max_position_embeddings"))
    return theta, scaling


def _scaling(rope: ConfigFields, kind: str, context: int) -> RopeScaling:
    factor = rope.read("factor", float, 1.0)
    if kind != "llama3":
        return RopeScaling(kind, factor)
    return RopeScaling(
        kind,
        factor,
        rope.read("low_freq_factor", float),
        rope.read("high_freq_factor", float),
        rope.read("original_max_position_embeddings", int, context),
    )


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Rotary fields that transformers 4 and 5 both read."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    s = scaling
    written = {"rope_type": s.kind, "type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
        written |= {
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }
    return {"rope_theta": theta, "rope_scaling": written}
