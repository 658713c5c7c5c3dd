"""Which pairs are made from a record: one for each trace, an answer, an empty trace."""

import dataclasses
from collections.abc import Callable

from jaxpref.data.records import Example, expand
from jaxpref.data.records.labeled import answers_of
from jaxpref.errors import InputError

ToPairs = Callable[[Example, str], list[Example]]
"""`(record, place) -> pairs`: the pairs made from a record."""


def unchanged(example: Example, place: str) -> list[Example]:
    """One pair for each trace."""
    return expand(example)


def labeled_answers(example: Example, place: str) -> list[Example]:
    """Single answers with labels; a pair gives two."""
    return [x for answer in answers_of(example) for x in expand(answer)]


def with_empty(example: Example, place: str) -> list[Example]:
    """One pair for each trace; an empty trace if there is none."""
    return expand(example) if example.traces else only_empty(example, place)


def with_empty_too(example: Example, place: str) -> list[Example]:
    """One pair for each trace, and one with an empty trace."""
    empty = dataclasses.replace(example, traces=(), empty=True)
    return [*expand(example), empty] if example.traces else [empty]


def only_empty(example: Example, place: str) -> list[Example]:
    """One pair with an empty trace; an error if there are traces."""
    if example.traces:
        raise InputError(
            f"{place}: field 'trace' occurs in data without traces; remove it, or use"
            " the file as the data with traces"
        )
    return [dataclasses.replace(example, empty=True)]
