"""Finds the parts of an answer in rendered text, and decodes new tokens as text."""

import dataclasses
import json
from typing import Any, NamedTuple

from jaxpref.data.records import THOUGHT_FIELDS, Message, text_of
from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class TraceMarkers:
    """The markers before and after a reasoning trace."""

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self):
        for name in ("open", "close"):
            if not getattr(self, name).strip():
                raise InputError(f"trace_{name} is blank; give the model's own marker")


THINK = TraceMarkers()
"""The markers of most reasoning models."""


class Turn(NamedTuple):
    """An assistant's turn in a rendered conversation, in characters."""

    start: int
    text_end: int
    """Where what the record says ends."""
    end: int
    """Where the next turn begins."""
    is_block: bool = False
    """Whether a block of the template says that all of it is what the model writes."""


def has_thought(message: str | Message, markers: TraceMarkers) -> bool:
    """Whether an answer contains thinking, perhaps unfinished."""
    if not isinstance(message, str) and any(message.get(x) for x in THOUGHT_FIELDS):
        return True
    content = text_of(message)
    return any(mark.strip() in content for mark in (markers.open, markers.close))


def missing_part(message: Message, text: str, markers: TraceMarkers) -> str | None:
    """A part of a message of the prompt that the rendered text lacks, or None.

    Templates may leave out the thinking of earlier answers.
    """
    content = text_of(message)
    if message["role"] == "assistant":
        content = content.rpartition(markers.close.strip())[2]
    for part in (content.strip(), *_words_of(message.get("tool_calls"))):
        if not any(form in text for form in _forms(part)):
            return part
    return None


def end_of_text(
    message: Message,
    whole: str,
    start: int,
    markers: TraceMarkers,
    *,
    anywhere: bool = False,
) -> int | None:
    """Where the text of an answer ends in the whole; None if some of it is missing.

    A template may write whitespace around each part, and may lay out thinking and
    tool calls in its own way.  With `anywhere`, it may also write other text before
    the answer.
    """
    content = message.get("content") or ""
    thoughts = [message[x] for x in THOUGHT_FIELDS if isinstance(message.get(x), str)]
    calls = message.get("tool_calls")
    if not thoughts and not calls and markers.close.strip() not in content:
        end = end_of_word(content, whole, start)
        if end is None and anywhere:
            found = whole.find(content.strip(), start)
            end = found + len(content.strip()) if found >= 0 else None
        return end
    thought, _, answer = content.rpartition(markers.close.strip())
    thought = thought.strip().removeprefix(markers.open.strip())
    end: int | None = start
    for part in (*thoughts, thought, answer):
        found = whole.find(part.strip(), end)
        if found < 0:
            return None
        end = found + len(part.strip())
    for word in _words_of(calls):
        found = [(whole.find(x, start), len(x)) for x in _forms(word)]
        found = [at + size for at, size in found if at >= 0]
        if not found:
            return None
        end = max(end, *found)
    return end


def trace_span(
    whole: str, prompt: str, opening: str, trace: str, close: str, answer: str
) -> tuple[int, int, int] | None:
    """Start and end of the trace, and the end of the answer, in a rendered turn.

    None if they are not all there.
    """
    at: int | None = len(prompt) if whole.startswith(prompt) else None
    ends = []
    for word in (opening, trace, close, answer):
        at = None if at is None else end_of_word(word, whole, at)
        ends.append(at)
    if at is None:
        return None
    return ends[1] - len(trace.strip()), ends[1], at


def end_of_word(word: str, text: str, start: int) -> int | None:
    """The end of `word` if it comes next in `text`, ignoring whitespace around it."""
    while start < len(text) and text[start].isspace():
        start += 1
    word = word.strip()
    return start + len(word) if text.startswith(word, start) else None


def ends_with(text: str, marker: str) -> bool:
    """Whether a text ends with a marker, ignoring whitespace after it."""
    return text.rstrip().endswith(marker.strip())


def _forms(word: str) -> tuple[str, ...]:
    """How a template may write a text: as it is, or as JSON."""
    return word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]


def _words_of(value: Any) -> list[str]:
    """The names and values in tool calls, as text; arguments may be JSON text."""
    if isinstance(value, dict):
        items = {k: v for k, v in value.items() if k not in ("type", "id")}
        return [word for part in items.values() for word in _words_of(part)]
    if isinstance(value, list):
        return [word for part in value for word in _words_of(part)]
    if isinstance(value, str):
        try:
            decoded = value
            if value.lstrip()[:1] in ("{", "["):
                # Numbers stay as they are written.
                decoded = json.loads(value, parse_float=str, parse_int=str)
        except (ValueError, RecursionError):
            decoded = value
        return _words_of(decoded) if decoded is not value else [value]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def decode_continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens as it continues the prompt's.

    Tokenizers decode a token differently after other tokens: alone, the first of them
    may lose its space.
    """
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    before, whole = decode(prompt), decode(prompt + new)
    return whole[len(before) :] if whole.startswith(before) else decode(new)
