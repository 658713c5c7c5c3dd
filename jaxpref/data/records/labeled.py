"""Single answers with a label: `prompt` and `completion`, or `messages`, and `label`.

The other formats read the prompt and the answer.  The label is a number of the record,
like those of `data.columns`: `desirable`, which is 1 or 0.
"""

import dataclasses
from collections.abc import Mapping

from jaxpref.data.records.example import Example
from jaxpref.errors import InputError

ANSWERS = ("completion", "messages")
"""Fields with a single answer."""


def check_other(record: Mapping, where: str, sides: int | None) -> None:
    """Raises InputError if a run that reads pairs gets a single answer with a label."""
    if sides == 2 and is_labeled(record):
        answer = next(name for name in ANSWERS if name in record)
        raise InputError(
            f"{where}: a single answer ('{answer}') with a 'label', but this "
            "command reads pairs; train on it with --loss kto, bco or "
            "apo_zero_unpaired, evaluate a model on it with jaxpref evaluate, or write "
            "'chosen' and 'rejected'"
        )


def is_labeled(record: Mapping) -> bool:
    """Whether a record is a single answer with a label."""
    answer = any(name in record for name in ANSWERS)
    return answer and "label" in record and "rejected" not in record


def answers_of(example: Example) -> list[Example]:
    """The answers of a pair, the chosen one desirable; a single answer as it is."""
    if len(example.completions) == 1:
        return [example]
    return [
        dataclasses.replace(
            example.alone(side),
            numbers=example.numbers | {"desirable": desirable},
        )
        for side, desirable in ((0, 1.0), (1, 0.0))
    ]
