"""Conversations: lists of messages {"role": ..., "content": ...}.

A record has `prompt`, `chosen` and `rejected` as messages or texts, or whole
conversations in `chosen` and `rejected` that share all but the last message, or one
conversation in `messages`.  The completion is always the last assistant turn.  If a
conversation repeats the prompt, it is used once.
"""

from collections.abc import Mapping, Sequence

from jaxpref.data.records.checks import (
    completion_fields,
    is_columns,
    is_message,
    text_or_messages,
    to_example,
)
from jaxpref.data.records.example import Example, Message, text_of
from jaxpref.errors import InputError


def matches(record: Mapping, sides: int) -> bool:
    """Whether the prompt or a completion is a message or a list of them."""
    names = ("prompt", *completion_fields(record, sides))
    values = [record.get(name) for name in names]
    return any(
        isinstance(value, list) or is_columns(value) or is_message(value)
        for value in values
    )


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`."""
    names = completion_fields(record, sides)
    values = [text_or_messages(record, name, where) for name in names]
    prompt = text_or_messages(record, "prompt", where) if "prompt" in record else []
    return example_of(prompt, names, values, where, drop_empty=drop_empty)


def example_of(
    prompt: str | list[Message],
    names: Sequence[str],
    values: Sequence[str | list[Message]],
    where: str,
    *,
    drop_empty: bool,
) -> Example | str:
    """The example of a prompt and completions, each a text or messages.

    It is a conversation unless all of them are texts.
    """
    if isinstance(prompt, str) and all(isinstance(value, str) for value in values):
        texts = [(prompt, value) for value in values if isinstance(value, str)]
        return to_example(names, texts, where, drop_empty=drop_empty)
    splits = [
        _split(prompt, name, value, where)
        for name, value in zip(names, values, strict=True)
    ]
    return to_example(names, splits, where, drop_empty=drop_empty)


def with_prompt(record: dict) -> dict:
    """The record with `messages` as its prompt if they end without an answer."""
    turns = record.get("messages")
    if "prompt" in record or not isinstance(turns, list) or not turns:
        return record
    if not is_message(turns[-1]) or turns[-1]["role"] == "assistant":
        return record
    others = {name: value for name, value in record.items() if name != "messages"}
    return others | {"prompt": turns}


def _split(
    prompt: str | list[Message], name: str, value: str | list[Message], where: str
) -> tuple[tuple[Message, ...], Message]:
    """The messages before the last assistant turn, and that turn."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    if not value or value[-1]["role"] != "assistant":
        raise InputError(f"{where}: field '{name}' must end with an assistant message")
    turns = _joined(prompt, value[:-1])
    if turns is None:
        raise InputError(
            f"{where}: field '{name}' does not continue 'prompt'; remove one of the two"
        )
    if not turns:
        raise InputError(
            f"{where}: field '{name}' has no message before the answer and there is no"
            " 'prompt'"
        )
    return tuple(turns), value[-1]


def _joined(prompt: list[Message], turns: list[Message]) -> list[Message] | None:
    """The prompt followed by the turns, without overlap; None if they contradict."""
    question, answered = (
        [(message["role"], text_of(message).strip()) for message in part]
        for part in (prompt, turns)
    )
    for size in range(min(len(question), len(answered)), 0, -1):
        if question[-size:] == answered[:size]:
            return prompt + turns[size:]
    if not question or not answered or answered[0][0] in ("assistant", "tool"):
        return prompt + turns
    if any(answered[n : n + len(question)] == question for n in range(len(answered))):
        return turns
    follows = answered[0][0] == "user" and question[-1][0] != "user"
    return prompt + turns if follows else None
