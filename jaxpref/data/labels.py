"""What annotators said of a pair beside its order: one number each, from the record."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxpref.errors import InputError

T = TypeVar("T")

LARGEST = float(np.finfo(np.float32).max)
LIMITS = {
    "preference_strengths": (0.0, LARGEST, "0 or more"),
    "ties": (0.0, 1.0, "from 0 to 1"),
}
"""Least and greatest value, and how to say so; of others any finite number will do."""
EXCHANGED = {
    "chosen_ratings": "rejected_ratings",
    "rejected_ratings": "chosen_ratings",
}
"""What belongs to an answer and not to the pair, and so goes where the answer goes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFields:
    """Fields of the records with numbers that a loss reads, by the loss's names.

    `a.b` is the field b of the object in field a.  A pair that is flipped keeps margin,
    strength and tie, as if its annotator had said the opposite just as clearly; its
    ratings change places with the answers they belong to.
    """

    preference_margins: str | None = None
    """Field that says by how much the chosen answer's reward must be higher, in nats:
    any number."""
    preference_strengths: str | None = None
    """Field that says how strong the preference is, as a weight of the pair: 0 or
    more."""
    ties: str | None = None
    """Field that says whether it is a tie: true or 1, false or 0, or the share of
    annotators who called one.  Accuracies count ties as they are labeled."""
    chosen_ratings: str | None = None
    """Field with the rating of the chosen answer: any number."""
    rejected_ratings: str | None = None
    """Field with the rating of the rejected answer."""

    def __post_init__(self):
        if (self.chosen_ratings is None) != (self.rejected_ratings is None):
            raise InputError(
                "chosen_ratings and rejected_ratings change places where a pair is "
                "flipped: name the fields of both"
            )

    @property
    def named(self) -> dict[str, str]:
        """The loss's name -> the record's, of those that are given."""
        pairs = dataclasses.asdict(self).items()
        return {name: field for name, field in pairs if field is not None}


NONE = LabelFields()
"""Nothing beside the order."""
LABELS = frozenset(field.name for field in dataclasses.fields(LabelFields))
"""What a loss may read of the records, a number a pair each."""


def read_labels(record: dict, where: str, fields: LabelFields) -> dict[str, float]:
    """The numbers of a record, by the loss's name.

    Args:
      record: as decoded from the file.
      where: "file row n", for errors.
      fields: where they are.

    Raises:
      InputError: one is missing, no number, or out of its range; names row and field.
    """
    return {
        name: _number(record, field, where, name)
        for name, field in fields.named.items()
    }


def exchanged(labels: Mapping[str, T]) -> dict[str, T]:
    """The numbers of the pair with its answers in the other order, by name."""
    return {name: labels[EXCHANGED.get(name, name)] for name in labels}


def _number(record: dict, field: str, where: str, name: str) -> float:
    value = _value(record, field)
    flag = f"--labels.{name.replace('_', '-')}"
    if value is None:
        raise InputError(
            f"{where}: no field '{field}' for {name}; the record has"
            f" {', '.join(map(str, record))[:200]}; remove the row or change {flag}"
        )
    if isinstance(value, bool) and name == "ties":
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{where}: field '{field}' must be a number for {name}, but it is"
            f" {value!r:.50}; correct it or change {flag}"
        )
    low, high, bounds = LIMITS.get(name, (-LARGEST, LARGEST, "finite"))
    # Compared before it becomes a float: an integer may be too large for one.
    if not low <= value <= high:
        raise InputError(
            f"{where}: field '{field}' must be {bounds} for {name}, but it is"
            f" {value!r:.50}; correct it or remove the row"
        )
    return float(value)


def _value(record: dict, field: str) -> Any:
    """The value of `a.b`, of a field of just that name first; None if there is none."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
