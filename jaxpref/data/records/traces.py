"""Reasoning traces: a `prompt`, and completions {"trace": ..., "answer": ...}.

The trace is a string or a list of several samples; the answer follows it.  Both are
written without markers.  Either both sides have a trace, or neither has one.
"""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.checks import (
    checked_text,
    completion_fields,
    field,
    kind,
    prompt_and_messages,
)
from jaxpref.data.records.example import EMPTY, IDENTICAL, Example, Message
from jaxpref.errors import InputError


def matches(record: Mapping, sides: int) -> bool:
    """Whether a completion is an object with a trace or an answer."""
    return any(_is_traced(record.get(x)) for x in completion_fields(record, sides))


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`."""
    names = completion_fields(record, sides)
    prompt = prompt_and_messages(record, where)
    values = {name: field(record, name, where) for name in names}
    for name, value in values.items():
        if not _is_traced(value):
            raise InputError(
                f"{where}: field '{name}' must be an object of trace and answer as the"
                f" other side is, but it is {kind(value)}"
            )
    traces = tuple(_traces(values[name], f"{where}: field '{name}'") for name in names)
    if any(traces) and not all(traces):
        without = names[traces.index(())]
        raise InputError(
            f"{where}: field '{without}' has no 'trace', but the other side has one;"
            " give both sides a trace, or neither"
        )
    answers = [_answer(values[name], f"{where}: field '{name}'") for name in names]
    for name, answer in zip(names, answers):
        if not answer.strip():
            if drop_empty:
                return EMPTY
            raise InputError(
                f"{where}: field '{name}' has an empty 'answer'; remove the row, or set"
                " drop_empty"
            )
    completions: tuple[str | Message, ...] = tuple(answers)
    if not isinstance(prompt, str):
        completions = tuple({"role": "assistant", "content": x} for x in answers)
    example = Example(prompt, completions, traces=traces if any(traces) else ())
    return IDENTICAL if example.is_identical else example


def _is_traced(value: Any) -> bool:
    return isinstance(value, dict) and not {"trace", "answer"}.isdisjoint(value)


def _traces(value: dict, place: str) -> tuple[str, ...]:
    """The traces of one side; empty if the field is missing or null."""
    traces = value.get("trace")
    if traces is None:
        return ()
    listed = traces if isinstance(traces, list) else [traces]
    if not listed:
        raise InputError(
            f"{place} has an empty list as 'trace'; give at least one, or leave 'trace'"
            " out on both sides"
        )
    for n, trace in enumerate(listed):
        if not isinstance(trace, str):
            which = f" {n + 1}" if isinstance(traces, list) else ""
            raise InputError(
                f"{place} 'trace'{which} must be a string, but it is {kind(trace)}"
            )
        checked_text(trace, f"{place} 'trace'")
    return tuple(listed)


def _answer(value: dict, place: str) -> str:
    if value.get("answer") is None:
        raise InputError(f"{place} has no 'answer'; give the text after the trace")
    if not isinstance(value["answer"], str):
        raise InputError(
            f"{place} 'answer' must be a string, but it is {kind(value['answer'])}"
        )
    return checked_text(value["answer"], f"{place} 'answer'")
