"""ShareGPT: turns `{"from": "human", "value": ...}`, in a field `conversations`.

A pair has the conversation in `conversations` (or `prompt`) and a turn, or a list of
turns, in `chosen` and `rejected`.  Without these, the last turn of the conversation is
the completion.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxpref.data.records import messages
from jaxpref.data.records.checks import (
    check_message_fields,
    completion_fields,
    field,
    kind,
)
from jaxpref.data.records.example import Example
from jaxpref.errors import InputError

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""The role of each speaker."""


def matches(record: Mapping, sides: int) -> bool:
    """Whether there are turns with `from` and `value`."""
    if "conversations" in record and "prompt" not in record:
        return True
    names = ("prompt", *completion_fields(record, sides))
    return any(_is_turn(_first(record.get(name))) for name in names)


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`."""
    name = "conversations" if "conversations" in record else "prompt"
    turns = _messages(field(record, name, where), f"{where}: field '{name}'", "human")
    names = completion_fields(record, sides)
    if sides == 1 and names[0] not in record:
        return messages.parse(
            {"messages": turns}, where, sides=sides, drop_empty=drop_empty
        )
    answers = {
        side: _messages(field(record, side, where), f"{where}: field '{side}'", "gpt")
        for side in names
    }
    return messages.parse(
        {"prompt": turns} | answers, where, sides=sides, drop_empty=drop_empty
    )


def with_prompt(record: dict, where: str) -> dict:
    """The record with messages as its prompt if its turns end without an answer.

    The turns are in `prompt` or `conversations`.
    """
    name = "prompt" if "prompt" in record else "conversations"
    if not _is_turn(_first(record.get(name))):
        return record
    turns = _messages(record[name], f"{where}: field '{name}'", "human")
    if turns[-1]["role"] == "assistant":
        return record
    others = {key: value for key, value in record.items() if key != name}
    return others | {"prompt": turns}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and {"from", "value"} <= value.keys()


def _messages(value: Any, place: str, speaker: str) -> list[dict]:
    """The messages of turns, or of one text by the speaker."""
    if isinstance(value, str):
        value = {"from": speaker, "value": value}
    turns = value if isinstance(value, list) else [value]
    return [_message(turn, f"{place} turn {n + 1}") for n, turn in enumerate(turns)]


def _message(turn: Any, place: str) -> dict:
    if isinstance(turn, dict) and {"role", "content"} <= turn.keys():
        return turn
    if not _is_turn(turn):
        raise InputError(
            f'{place} must be {{"from": ..., "value": ...}}, but it is {kind(turn)}'
        )
    check_message_fields(turn, place)
    role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise InputError(
            f"{place}: 'from' must be one of {', '.join(ROLES)}, but it is"
            f" {turn['from']!r:.50}"
        )
    if turn["from"] != "function_call":
        return {"role": role, "content": turn["value"]}
    try:
        call = json.loads(turn["value"])
    except (TypeError, ValueError):
        call = None
    if not isinstance(call, dict) or "name" not in call:
        raise InputError(
            f"{place}: 'value' of a function_call must be a JSON object with a name and"
            " arguments"
        )
    calls = [{"type": "function", "function": call}]
    return {"role": role, "content": None, "tool_calls": calls}
