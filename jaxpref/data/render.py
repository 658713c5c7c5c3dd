"""From examples to text: chat templates, and reasoning traces between their markers.

A completion with a trace is `open trace close answer`, after the prompt.  A pair with
an empty trace has `open close` at the end of its prompt, so that the completion is the
answer alone.  BVPO (arXiv:2510.05095) calls this the empty-trace pair.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpref.data.records import Example, Message
from jaxpref.errors import InputError, first_line

_STAND_IN = "TheAnswerStandsHere"


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


@dataclasses.dataclass(frozen=True)
class Texts:
    """One example as text."""

    prompt: str
    wholes: list[str]
    """The prompt with each completion."""
    traces: list[tuple[int, int]] | None = None
    """Start and end of the trace in each whole, in characters; None without traces."""


def render(
    example: Example,
    place: str,
    tokenizer: Any,
    markers: TraceMarkers = THINK,
) -> Texts:
    """The text of the prompt, and of the prompt with each completion.

    Templates that support `enable_thinking` are given true before a trace and false
    before an empty one; other examples are rendered without it.  Some templates omit
    the trace of the last turn.  The turn is then assembled here: the template's
    opening, the trace, the answer and the template's end of a turn.

    Args:
      example: an example with at most one trace per side; see `expand`.
      place: "file row n", for errors.
      tokenizer: its chat template renders conversations.
      markers: the markers of traces.

    Raises:
      InputError: if the example is a conversation, and the tokenizer has no chat
        template or the template rejects it.
    """
    if example.traces:
        return _with_traces(example, place, tokenizer, markers)
    if example.empty:
        return _with_empty_trace(example, place, tokenizer, markers)
    if isinstance(example.prompt, str):
        wholes = [example.prompt + x for x in example.texts]
        return Texts(example.prompt, wholes)
    prompt = _template(example.prompt, place, tokenizer, True)
    wholes = [
        _template([*example.prompt, message], place, tokenizer, False)
        for message in example.completions
        if not isinstance(message, str)  # a conversation has none
    ]
    if not all(whole.startswith(prompt) for whole in wholes):
        # Some templates begin an existing answer differently, for example with a
        # thought.  The text before it must be the same, except for an EOS that ends a
        # conversation without an answer.
        question = _template(example.prompt, place, tokenizer, False).rstrip()
        question = question.removesuffix(tokenizer.eos_token).rstrip()
        if not all(text.startswith(question) for text in (prompt, *wholes)):
            raise InputError(
                f"{place}: the chat template writes the prompt differently when an"
                " answer follows it; use a template that does not"
            )
    return Texts(prompt, wholes)


def render_prompt(
    prompt: str | Sequence[Message],
    place: str,
    tokenizer: Any,
    *,
    thinking: bool | None = None,
    markers: TraceMarkers = THINK,
) -> str:
    """The text of a prompt to be answered.

    Args:
      prompt: a text, or messages for the chat template.
      place: "file row n", for errors.
      tokenizer: whose chat template renders messages.
      thinking: True before a trace; False to end with an empty trace; None for data
        without traces.  For False, no markers are added if the template's text depends
        on `enable_thinking`, since it then has its own convention.
      markers: the markers of traces; those already at the end are not repeated.
    """
    if isinstance(prompt, str):
        return prompt + _empty(prompt, markers) if thinking is False else prompt
    if thinking is None:
        return _template(prompt, place, tokenizer, True)
    text = _template(prompt, place, tokenizer, True, enable_thinking=thinking)
    if thinking or text != _template(
        prompt, place, tokenizer, True, enable_thinking=True
    ):
        return text
    return text + _empty(text, markers)


def _with_traces(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> Texts:
    prompt = render_prompt(
        example.prompt, place, tokenizer, thinking=True, markers=markers
    )
    opening = "" if _ends_with(prompt, markers.open) else markers.open
    wholes, spans = [], []
    for (trace,), answer in zip(example.traces, example.texts):
        end, kept = "", None
        if not isinstance(example.prompt, str):
            content = markers.open + trace + markers.close + answer
            whole = _turn(example.prompt, content, place, tokenizer, thinking=True)
            kept = _span(whole, prompt, opening, trace, markers.close, answer)
        if kept is None:
            if not isinstance(example.prompt, str):
                end = _end_of_turn(example.prompt, place, tokenizer, thinking=True)
            head = prompt + opening
            whole = head + trace + markers.close + answer + end
            kept = (len(head), len(head) + len(trace))
        wholes.append(whole)
        spans.append(kept)
    return Texts(prompt, wholes, spans)


def _with_empty_trace(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> Texts:
    prompt = render_prompt(
        example.prompt, place, tokenizer, thinking=False, markers=markers
    )
    if isinstance(example.prompt, str):
        return Texts(prompt, [prompt + answer for answer in example.texts])
    wholes = []
    for answer in example.texts:
        whole = _turn(example.prompt, answer, place, tokenizer, thinking=False)
        if not whole.startswith(prompt) or _behind(answer, whole, len(prompt)) is None:
            end = _end_of_turn(example.prompt, place, tokenizer, thinking=False)
            whole = prompt + answer + end
        wholes.append(whole)
    return Texts(prompt, wholes)


def _empty(prompt: str, markers: TraceMarkers) -> str:
    """The markers that this prompt still lacks to end with an empty trace."""
    if _ends_with(prompt, markers.close):
        before = prompt.rstrip().removesuffix(markers.close.strip())
        if _ends_with(before, markers.open):
            return ""
    opened = _ends_with(prompt, markers.open)
    return markers.close if opened else markers.open + markers.close


def _ends_with(text: str, marker: str) -> bool:
    return text.rstrip().endswith(marker.strip())


def _span(
    whole: str, prompt: str, opening: str, trace: str, close: str, answer: str
) -> tuple[int, int] | None:
    """Start and end of the trace in a rendered turn; None if it is not all there."""
    at: int | None = len(prompt) if whole.startswith(prompt) else None
    ends = []
    for word in (opening, trace, close, answer):
        at = None if at is None else _behind(word, whole, at)
        ends.append(at)
    if at is None:
        return None
    return ends[1] - len(trace.strip()), ends[1]


def _behind(word: str, text: str, start: int) -> int | None:
    """The end of `word` if it comes next in `text`, ignoring white space around it."""
    while start < len(text) and text[start].isspace():
        start += 1
    word = word.strip()
    return start + len(word) if text.startswith(word, start) else None


def _turn(
    prompt: Sequence[Message],
    content: str,
    place: str,
    tokenizer: Any,
    *,
    thinking: bool,
) -> str:
    messages = [*prompt, {"role": "assistant", "content": content}]
    return _template(messages, place, tokenizer, False, enable_thinking=thinking)


def _end_of_turn(
    prompt: Sequence[Message], place: str, tokenizer: Any, *, thinking: bool
) -> str:
    """The text that the template writes after an answer."""
    whole = _turn(prompt, _STAND_IN, place, tokenizer, thinking=thinking)
    _, found, end = whole.rpartition(_STAND_IN)
    if not found:
        raise InputError(
            f"{place}: the chat template changes the text of the answer; use a"
            " template that does not"
        )
    return end


def _template(
    messages: Sequence[Message],
    place: str,
    tokenizer: Any,
    open_answer: bool,
    **variables: bool,
) -> str:
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        # Do not invent a template: the model has never seen it, and no server of the
        # exported model would use it.
        raise InputError(
            f"{place}: the record holds messages, but the tokenizer has no chat"
            " template; use a tokenizer that has one (chat_template.jinja in the model"
            " folder), or write prompt, chosen and rejected as strings"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=open_answer,
            **variables,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{place}: the chat template rejects it ({first_line(error)})"
        ) from None
