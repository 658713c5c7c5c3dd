"""Texts: `prompt`, `chosen` and `rejected`, or `prompt` and `completion`."""

from collections.abc import Mapping

from jaxpref.data.records.checks import (
    completion_fields,
    text,
    to_example,
)
from jaxpref.data.records.example import Example


def matches(record: Mapping, sides: int) -> bool:
    """Whether there is a prompt; more specific formats are tried first."""
    return "prompt" in record


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`."""
    names = completion_fields(record, sides)
    completions = [text(record, name, where) for name in names]
    prompt = text(record, "prompt", where)
    splits = [(prompt, completion) for completion in completions]
    return to_example(names, splits, where, drop_empty=drop_empty)
