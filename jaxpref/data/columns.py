"""Numbers of a record besides the order of its answers: `--columns NAME=FIELD`.

A name is that of an array that a loss reads (`ARRAYS`), or of a hyperparameter of the
loss, which then differs between records, or `weight`, or `rating.ATTRIBUTE`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxpref.data.cells import from_cell
from jaxpref.errors import InputError

Number = TypeVar("Number", float, np.ndarray)

FLAG = "--columns"
RATING = "rating."
"""What the columns with ratings of single answers begin with: `rating.helpfulness`.
Their field is the attribute unless it is named.  A rating that is absent is NaN."""
HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""The attributes of HelpSteer2, arXiv:2406.08673."""
WEIGHT = "weight"
"""The column that no loss reads, since it multiplies every loss."""
VOTES = "votes"
"""The column with the answers that several votes prefer; see `data.votes`."""
LARGEST = float(np.finfo(np.float32).max)
LIMITS = {
    "strength": (0.0, LARGEST, "0 or more"),
    "tie": (0.0, 1.0, "from 0 to 1"),
    "chosen_first": (0.0, 1.0, "from 0 to 1"),
    "flip_rate": (0.0, 1.0, "from 0 to 1"),
    WEIGHT: (0.0, LARGEST, "0 or more"),
}
"""Minimum, maximum and a description of them; others may be any finite number."""
EXCHANGED = {
    "chosen_rating": "rejected_rating",
    "rejected_rating": "chosen_rating",
}
"""Columns that belong to an answer, and so are swapped together with the answers."""
BOOLEAN = ("tie", "chosen_first", "desirable")
"""Columns that may be true or false in a record."""
BINARY = ("desirable",)
"""Columns that must be true or false, or 1 or 0."""
OPPOSITE = ("chosen_first", "desirable")
"""Columns that a flip turns into their opposite, 1 - x."""
DEFAULT_FIELDS = {"desirable": "label"}
"""The fields of columns that need not be named."""
SAMPLED = "sampled_rewards"
"""The column with the rewards of answers that are sampled in training."""
OF_ANSWERS = frozenset({"qualities", "relevances", "ranks", SAMPLED})
"""Columns with one number for each answer of a list; see `records.lists`."""
ARRAYS = OF_ANSWERS | {
    "margin",
    "strength",
    "tie",
    "chosen_rating",
    "rejected_rating",
    "flip_predictor",
    "chosen_first",
    "desirable",
    "degree",
}
"""Arrays of losses and objectives that come from the records; docs/data.md explains
them."""


def names_of(words: Iterable[str]) -> list[str]:
    """The names in words that are separated by commas or spaces."""
    return [x.strip() for word in words for x in word.split(",") if x.strip()]


def rated(names: Iterable[str]) -> tuple[str, ...]:
    """The attributes whose ratings are among some columns, in their order."""
    return tuple(x.removeprefix(RATING) for x in names if x.startswith(RATING))


def accept(name: str, value: float) -> None:
    """Accepts every value of a hyperparameter."""
    del name, value


def fields_to_read(named: Mapping[str, str], read: Collection[str]) -> dict[str, str]:
    """The fields that are named, and those with a default, exactly if they are read."""
    own = {name: name.removeprefix(RATING) for name in read if name.startswith(RATING)}
    defaults = {k: x for k, x in DEFAULT_FIELDS.items() if k in read} | own
    fields = {k: named.get(k, x) for k, x in defaults.items()}
    return {k: x for k, x in named.items() if k not in DEFAULT_FIELDS} | fields


def missing_columns(named: Mapping[str, str], read: Collection[str]) -> list[str]:
    """The columns that are read and must be named, but are not."""
    return sorted(set(read) - fields_to_read(named, read).keys() - OF_ANSWERS)


def read_columns(
    record: Mapping, where: str, fields: Mapping[str, str]
) -> dict[str, float]:
    """The numbers of a record, by column.

    Args:
      record: as decoded from the file.
      where: "file row n", for errors.
      fields: the field by column.  `a.b` is the field b of the object in field a.

    Raises:
      InputError: if one is missing, not a number, or out of range; names row and field.
    """
    return {x: _number(record, field, where, x) for x, field in fields.items()}


def exchanged(columns: Mapping[str, Number]) -> dict[str, Number]:
    """The columns of a pair after its answers are swapped, or of a flipped answer.

    A flipped pair keeps its numbers, as if the annotator had stated the opposite just
    as clearly, except for those of single answers, which move with the answers.
    """
    swapped = {name: columns[EXCHANGED.get(name, name)] for name in columns}
    return swapped | {name: 1 - swapped[name] for name in OPPOSITE if name in swapped}


def check_rated(
    columns: Mapping[str, np.ndarray], fields: Mapping[str, str], place: str
) -> None:
    """Checks that some record has each of the ratings that are read.

    Args:
      columns: the numbers of all records, by column.
      fields: the field by column.
      place: where the records are, for errors.

    Raises:
      InputError: naming the field that no record has.
    """
    for name, field in fields.items():
        if name.startswith(RATING) and np.isnan(columns[name]).all():
            raise InputError(
                f"{place}: no training record has a number in field '{field}', the "
                f"rating of {name.removeprefix(RATING)}; name its field with {FLAG} "
                f"{name}=FIELD, or leave the attribute out of --loss.attributes"
            )


def _number(record: Mapping, field: str, where: str, name: str) -> float:
    value = from_cell(field_value(record, field))
    flag = f"{FLAG} {name}={field}"
    if value is None and name.startswith(RATING):
        return float("nan")
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
