"""Labels of a record besides the order of its answers: numbers, from the record."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxpref.data.cells import from_cell
from jaxpref.errors import InputError

Number = TypeVar("Number", float, np.ndarray)

LARGEST = float(np.finfo(np.float32).max)
LIMITS = {
    "preference_strengths": (0.0, LARGEST, "0 or more"),
    "ties": (0.0, 1.0, "from 0 to 1"),
    "chosen_first": (0.0, 1.0, "from 0 to 1"),
    "p_correct": (0.0, 1.0, "from 0 to 1"),
    "weights": (0.0, LARGEST, "0 or more"),
}
"""Minimum, maximum and a description of them; others may be any finite number."""
EXCHANGED = {
    "chosen_ratings": "rejected_ratings",
    "rejected_ratings": "chosen_ratings",
}
"""Labels that belong to an answer, and so are swapped together with the answers."""
BOOLEAN = ("ties", "chosen_first", "desirable")
"""Labels that may be true or false in a record."""
BINARY = ("desirable",)
"""Labels that must be true or false, or 1 or 0."""
OPPOSITE = ("chosen_first", "desirable")
"""Labels that a flip turns into their opposite, 1 - x."""
DEFAULT_FIELDS = {"desirable": "label"}
"""The fields of labels that need not be named."""
LIST_LABELS = frozenset({"qualities", "relevances", "ranks"})
"""Labels with one number for each answer of a list; see `records.lists`."""
WEIGHTS = "weights"
"""The label that no loss reads, since it multiplies every loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFields:
    """Fields of the records with numbers that a loss reads, by the name it gives them.

    `a.b` is the field b of the object in field a.  A flipped pair keeps its margin,
    strength and tie, as if the annotator had stated the opposite just as clearly, and
    its p_correct, predictor and weight.  Its ratings are swapped together with the
    answers.
    """

    preference_margins: str | None = None
    """Field with the amount by which the chosen answer's reward must be higher, in
    nats: any number."""
    preference_strengths: str | None = None
    """Field with the strength of the preference, used as a weight of the pair: 0 or
    more."""
    ties: str | None = None
    """Field that marks a tie: true or 1, false or 0, or the share of annotators who
    called it a tie.  Accuracies count ties as labeled."""
    chosen_ratings: str | None = None
    """Field with the rating of the chosen answer: any number."""
    rejected_ratings: str | None = None
    """Field with the rating of the rejected answer."""
    p_correct: str | None = None
    """Field with the probability that the label is right, from 0 to 1, for the
    objective known_rates."""
    flip_predictors: str | None = None
    """Field with a number that predicts wrong labels, such as the difficulty of the
    pair, for the objective instance_noise; best with a standard deviation of about
    1."""
    chosen_first: str | None = None
    """Field that is true or 1 if the annotator saw the chosen answer first, and false
    or 0 otherwise, for the objective instance_noise."""
    desirable: str | None = None
    """Field that is true or 1 if the single answer of a record is desirable, and false
    or 0 if not, for losses such as kto (default: label)."""
    weights: str | None = None
    """Field with a weight, 0 or more, that multiplies the loss of the training pair,
    whatever the loss.  The sum is still divided by the number of pairs."""

    def __post_init__(self):
        if (self.chosen_ratings is None) != (self.rejected_ratings is None):
            raise InputError(
                "chosen_ratings and rejected_ratings are swapped when a pair is "
                "flipped: name the fields of both"
            )

    @property
    def named(self) -> dict[str, str]:
        """The loss's name -> the record's field, for all fields that are set."""
        pairs = dataclasses.asdict(self).items()
        return {name: field for name, field in pairs if field is not None}

    def reading(self, labels: Collection[str]) -> "LabelFields":
        """The same fields; those with a default are set exactly if they are read."""
        fields = {
            name: (getattr(self, name) or default) if name in labels else None
            for name, default in DEFAULT_FIELDS.items()
        }
        return dataclasses.replace(self, **fields)

    def missing(self, labels: Collection[str]) -> list[str]:
        """Those of the labels whose field must be named and is not."""
        named = self.reading(labels).named.keys()
        return sorted(set(labels) - named - LIST_LABELS)


NONE = LabelFields()
"""No labels besides the preference."""
LABELS = (frozenset(x.name for x in dataclasses.fields(LabelFields)) | LIST_LABELS) - {
    WEIGHTS
}
"""Labels that a loss may read: a number for each record, or for each answer of a list.
"""


def read_labels(record: Mapping, where: str, fields: LabelFields) -> dict[str, float]:
    """The numbers of a record, by the loss's name.

    Args:
      record: as decoded from the file.
      where: "file row n", for errors.
      fields: where they are.

    Raises:
      InputError: if one is missing, not a number, or out of range; names row and field.
    """
    return {
        name: _number(record, field, where, name)
        for name, field in fields.named.items()
    }


def exchanged(labels: Mapping[str, Number]) -> dict[str, Number]:
    """The labels of a pair after its answers are swapped, or of a flipped answer."""
    swapped = {name: labels[EXCHANGED.get(name, name)] for name in labels}
    return swapped | {name: 1 - swapped[name] for name in OPPOSITE if name in swapped}


def _number(record: Mapping, field: str, where: str, name: str) -> float:
    value = from_cell(field_value(record, field))
    flag = f"--labels.{name.replace('_', '-')}"
    if value is None:
        raise InputError(
            f"{where}: no field '{field}' for {name}; the record has"
            f" {', '.join(map(str, record))[:200]}; remove the row or change {flag}"
        )
    if name in BINARY and value not in (0, 1):
        raise InputError(
            f"{where}: field '{field}' must be true or false for {name}, but it is"
            f" {value!r:.50}; correct it or change {flag}"
        )
    if isinstance(value, bool) and name in BOOLEAN:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{where}: field '{field}' must be a number for {name}, but it is"
            f" {value!r:.50}; correct it or change {flag}"
        )
    low, high, bounds = LIMITS.get(name, (-LARGEST, LARGEST, "finite"))
    # Compare before converting to float: an integer may be too large.
    if not low <= value <= high:
        raise InputError(
            f"{where}: field '{field}' must be {bounds} for {name}, but it is"
            f" {value!r:.50}; correct it or remove the row"
        )
    return float(value)


def field_value(record: Mapping, field: str) -> Any:
    """The value of `a.b`, first as a literal field name; None if absent."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
