"""The rotary fields of config.json, shared by several families."""

import dataclasses
from typing import Any, NamedTuple

from jaxpref.errors import InputError
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

KINDS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "dynamic": DynamicScaling,
    "longrope": LongRopeScaling,
    "su": LongRopeScaling,
}
"""The scalings, by `rope_type`; "su" is an older name of "longrope"."""
CONTEXT = "original_max_position_embeddings"


class Rope(NamedTuple):
    """What config.json says about rotary positions."""

    theta: float
    """The base."""
    scaling: RopeScaling | None
    """The scaling of the frequencies."""
    share: float
    """The share of each head's features that is rotated."""


def read_rope(
    fields: ConfigFields,
    context: int,
    *,
    theta: float = 10000.0,
    share: float = 1.0,
) -> Rope:
    """The rotary base, its scaling, and the share of rotated features.

    As transformers 5 writes them (`rope_parameters`), or as older versions do
    (`rope_theta`, `rope_scaling`, `partial_rotary_factor`).

    Args:
        fields: the fields of the config.json.
        context: `max_position_embeddings`, the default of
            `original_max_position_embeddings`.
        theta: the base if the file has none.
        share: the share if the file has none.

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
    theta = rope.read("rope_theta", float, theta)
    share = rope.read("partial_rotary_factor", float, share)
    if not 0 < share <= 1:
        raise InputError(
            f"{rope.source}: field partial_rotary_factor is {share}; must be above 0 "
            "and at most 1"
        )
    older, newer = rope.get("type"), rope.get("rope_type")
    kind = newer or older or "default"
    original = fields.read(CONTEXT, int, context)  # Phi-3 has it outside
    scaling = None if kind == "default" else _scaling(rope, kind, original)
    if (
        isinstance(scaling, YarnScaling | LongRopeScaling)
        and rope.get("factor") is None
    ):
        ratio = context / scaling.original_max_position_embeddings
        scaling = dataclasses.replace(scaling, factor=ratio)
    # Only some kinds use it, but it is written for others too.
    rope.check_all_read(("factor", CONTEXT))
    return Rope(theta, scaling, share)


def _scaling(rope: ConfigFields, kind: Any, context: int) -> RopeScaling:
    make = KINDS.get(kind) if isinstance(kind, str) else None
    if make is None:
        raise InputError(
            f"{rope.source}: rope_type is {kind!r}; supported: default, "
            f"{', '.join(KINDS)}"
        )
    values = {}
    for field in dataclasses.fields(make):
        optional = field.default is not dataclasses.MISSING
        if field.name == CONTEXT:
            values[CONTEXT] = rope.read(CONTEXT, int, context)
        elif optional and rope.get(field.name) is None:
            continue
        elif field.type == tuple[float, ...]:
            values[field.name] = _numbers(rope, field.name)
        else:
            kind_of = field.type if field.type in (int, bool) else float
            values[field.name] = rope.read(field.name, kind_of)
    return make(**values)


def _numbers(rope: ConfigFields, name: str) -> tuple[float, ...]:
    values = rope.read(name, list)
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        raise InputError(f"{rope.source}: field {name} is not a list of numbers")
    return tuple(map(float, values))


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Rotary fields that transformers 4 and 5 both read."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    kind = next(name for name, make in KINDS.items() if make is type(scaling))
    written: dict[str, Any] = {"rope_type": kind, "type": kind}
    for name, value in dataclasses.asdict(scaling).items():
        if value is not None:
            written[name] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": theta, "rope_scaling": written}
