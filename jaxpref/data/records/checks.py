"""Checks that all record formats share: a field's type, its text, its messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.cells import from_cell
from jaxpref.data.records.example import (
    EMPTY,
    IDENTICAL,
    THOUGHT_FIELDS,
    Example,
    Message,
)
from jaxpref.errors import InputError, closest

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHARACTERS = 1_000_000
"""Maximum length of a text: about 250,000 tokens, more than fits into a row."""
COMPLETIONS = ("completion", "messages", "chosen")
"""Fields of a single completion; the first one in a record is read."""

OURS = (
    *("prompt", "completion", "completions", "messages", "chosen", "rejected"),
    *("chosen_prompt", "rejected_prompt"),
)
"""Fields whose names in the file `--fields` can give."""
MESSAGE_MEANING = (
    *("weight", "loss", "loss_weight", "train", "trainable", "mask"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
"""Fields of a message that change what is trained; 1 and true are their defaults."""

Split = tuple[str | tuple[Message, ...], str | Message]
"""A prompt and one completion."""


def completion_fields(record: Mapping, sides: int) -> tuple[str, ...]:
    """The fields that hold the completions of a record of pairs or single answers."""
    if sides == 2:
        return ("chosen", "rejected")
    present = [name for name in COMPLETIONS if name in record]
    return (present[0] if present else "completion",)


def field(record: Mapping, name: str, where: str) -> Any:
    """The field's value; an error if it is missing."""
    if name not in record:
        has = f"the record has {', '.join(map(str, record))[:200] or 'no fields'}"
        cure = f"; if it has another name, pass --fields {name}=NAME"
        raise InputError(
            f"{where}: no field '{name}'; {has}{closest(name, map(str, record))}"
            f"{cure if name in OURS else ''}"
        )
    return record[name]


def text_or_messages(record: Mapping, name: str, where: str) -> str | list[Message]:
    """The field's value, which must be a text or a list of messages."""
    value = field(record, name, where)
    if is_columns(value):
        value = [dict(zip(value, values)) for values in zip(*value.values())]
    if is_message(value):
        value = [value]
    if isinstance(value, list):
        return [
            _message(message, f"{where}: field '{name}' message {n + 1}")
            for n, message in enumerate(value)
        ]
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field '{name}' must be a string or messages"
            f' [{{"role": ..., "content": ...}}], but it is {kind(value)}'
        )
    return checked_text(value, f"{where}: field '{name}'")


def text(record: Mapping, name: str, where: str) -> str:
    """The field's value, which must be a text."""
    value = text_or_messages(record, name, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{name}' must be a string, not messages")
    return value


def is_columns(value: Any) -> bool:
    """Whether messages are stored by column, as Arrow and TFDS do."""
    columns = isinstance(value, dict) and set(value) >= {"role", "content"}
    return columns and all(isinstance(x, list) for x in value.values())


def is_message(value: Any) -> bool:
    """Whether a value is one message instead of a list of them."""
    return isinstance(value, dict) and "role" in value and not is_columns(value)


def prompt_and_messages(record: Mapping, where: str) -> str | tuple[Message, ...]:
    """The prompt of a record: a text, or at least one message."""
    prompt = text_or_messages(record, "prompt", where)
    if prompt == []:
        raise InputError(f"{where}: field 'prompt' has no messages; give one")
    return prompt if isinstance(prompt, str) else tuple(prompt)


def checked_text(text: str, place: str) -> str:
    """Checks that a text is Unicode and not too long; `place` names its field."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{place} has {len(text):,} characters; the limit is {MAX_CHARACTERS:,};"
            " shorten it or remove the row"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} holds half a surrogate pair at character {error.start + 1}, which"
            " is not Unicode text"
        ) from None
    return text


def to_example(
    names: Sequence[str], splits: Sequence[Split], where: str, *, drop_empty: bool
) -> Example | str:
    """Builds an example, or returns the reason why it cannot be used.

    Args:
      names: the field of each completion.
      splits: the prompt and completion of each field.
      where: "file row n", for errors.
      drop_empty: return EMPTY for an empty completion instead of raising.

    Raises:
      InputError: if a completion is empty.
    """
    for name, (_, completion) in zip(names, splits, strict=True):
        if says_something(completion):
            continue
        if drop_empty:
            return EMPTY
        raise InputError(
            f"{where}: field '{name}' is an empty completion; remove the row, or set"
            " drop_empty"
        )
    return joined(splits, where)


def joined(splits: Sequence[Split], where: str) -> Example | str:
    """The example of completions and their prompts, which may differ.

    Raises:
      InputError: if one prompt is a text, and another consists of messages.
    """
    if len(splits) == 2 and splits[0] == splits[1]:
        return IDENTICAL
    prompts, completions = zip(*splits)
    if len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise InputError(
            f"{where}: the prompt of one answer is a string, and that of another one"
            " consists of messages; write both in the same way"
        )
    same = all(prompt == prompts[0] for prompt in prompts)
    return Example(prompts[0], completions, own_prompts=() if same else prompts)


def says_something(completion: str | Message) -> bool:
    """Whether a completion has text, or calls a tool."""
    if isinstance(completion, str):
        return bool(completion.strip())
    content = completion.get("content") or ""
    others = ("tool_calls", *THOUGHT_FIELDS)
    return bool(content.strip()) or any(completion.get(name) for name in others)


def read_ended(record: Mapping, where: str, sides: int) -> tuple[bool, ...]:
    """The optional field `ended`: whether each answer is complete.

    One value for all answers, or a list of one each.  An answer that was cut off
    during sampling is trained on without a stop token.  Of a pair, training on single
    completions reads the chosen one.
    """
    value = record.get("ended")
    if value is None:
        return ()
    if sides == 1 and isinstance(value, list) and "rejected" in record:
        value = value[:1] if len(value) == 2 else value
    listed = value if isinstance(value, list) else [value] * sides
    if len(listed) != sides or not all(isinstance(x, bool) for x in listed):
        raise InputError(
            f"{where}: field 'ended' must be true or false, or a list of {sides} of"
            f" them, but it is {value!r:.50}"
        )
    return () if all(listed) else tuple(listed)


def read_flip(record: Mapping, where: str) -> bool:
    """The optional field `flip`: whether the label is known to be wrong."""
    value = from_cell(record.get("flip"))
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InputError(
        f"{where}: field 'flip' must be true or false, but it is {kind(value)}"
    )


def read_annotator(record: Mapping, where: str) -> str | None:
    """The optional field `annotator`."""
    value = record.get("annotator")
    if value is None or value == "":  # an empty cell of a CSV file
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(
            f"{where}: field 'annotator' must be a string or an integer, but it is"
            f" {kind(value)}"
        )
    return checked_text(str(value), f"{where}: field 'annotator'")


def kind(value: Any) -> str:
    """The type of a value, in JSON terms."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(
            f'{place} must be {{"role": ..., "content": ...}}, but it is'
            f" {kind(message)}"
        )
    if message.get("role") not in ROLES:
        raise InputError(
            f"{place}: role must be one of {', '.join(ROLES)}, but it is"
            f" {message.get('role')!r}"
        )
    check_message_fields(message, place)
    content = _content(message, place)
    # Columnar formats fill missing keys with null, which templates must not see.  A
    # null content beside a tool call is what such a message means.
    kept = {k: v for k, v in message.items() if v is not None and k != "content"}
    return kept | ({"content": content} if "content" in message else {})


def check_message_fields(message: dict, place: str) -> None:
    """Refuses a message with a field that changes what is trained and is not read.

    Raises:
      InputError: names the field.
    """
    for name in MESSAGE_MEANING:
        value = message.get(name)
        if value not in (None, True, 1, "", [], {}):
            raise InputError(
                f"{place}: field '{name}' changes what is trained and is not read;"
                " remove the row or the field"
            )


def _content(message: dict, place: str) -> str | None:
    """The content as text; None for a message that only calls tools."""
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise InputError(
            f"{place}: tool_calls must be a list of objects, but it is {kind(calls)}"
        )
    if content is None and calls:
        return None
    if isinstance(content, list):
        parts = enumerate(content, start=1)
        content = "\n".join(_part(part, f"{place} part {n}") for n, part in parts)
    if not isinstance(content, str):
        raise InputError(
            f"{place}: content must be a string or a list of text parts, but it is"
            f" {kind(content)}"
        )
    return checked_text(content, place)


def _part(part: Any, place: str) -> str:
    """The text of a part {"type": "text", "text": ...}."""
    value = part.get("text") if isinstance(part, dict) else part
    found = part.get("type", "text") if isinstance(part, dict) else "text"
    if found != "text":
        raise InputError(
            f"{place} is of type {found!r:.50}; only text is read, so remove the row"
        )
    if not isinstance(value, str):
        raise InputError(f"{place}: text must be a string, but it is {kind(value)}")
    return value
