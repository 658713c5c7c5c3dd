"""From examples to text: chat templates, and reasoning traces between their markers.

A completion after a trace is `open trace close answer`, all of it behind the prompt.
A pair with an empty trace has `open close` at the end of its prompt, so that the answer
alone is the completion: what BVPO (arXiv:2510.05095) calls the empty-trace pair.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpref.data.records import Example, Message
from jaxpref.errors import InputError, first_line

_STAND_IN = "TheAnswerStandsHere"


@dataclasses.dataclass(frozen=True)
class TraceMarkers:
    """What stands before and behind a reasoning trace."""

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
    """Where each whole's trace begins and ends, in characters; None without traces."""


def render(
    example: Example,
    place: str,
    tokenizer: Any,
    markers: TraceMarkers = THINK,
) -> Texts:
    """The text of the prompt, and of the prompt with each completion.

    A template that knows `enable_thinking` gets it as true before a trace and as false
    before an empty one; other examples are rendered without it.  Where a template
    leaves the trace of the last turn out, as some do, the turn is put together here:
    the template's opening, the trace, the answer and the template's end of a turn.

    Args:
      example: with one trace a side at most, see `expand`.
      place: "file row n", for errors.
      tokenizer: whose chat template renders a conversation.
      markers: of traces.

    Raises:
      InputError: a conversation, and the tokenizer has no chat template, or it refuses.
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
        # Some templates open the answer differently once there is one, with a thought
        # for example.  What comes before it must read the same; only an EOS that closes
        # a conversation without an answer may go.
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
      thinking: true as before a trace, false with an empty trace at its end (none of
        ours where the template's text depends on `enable_thinking`: it then has a
        convention of its own), None without a word about traces.
      markers: of traces; what the prompt ends with already is not written again.
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
    """What an empty trace at the end of this prompt still needs."""
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
    """Where the trace stands in a rendered turn; None if not all of it stands there."""
    at: int | None = len(prompt) if whole.startswith(prompt) else None
    ends = []
    for word in (opening, trace, close, answer):
        at = None if at is None else _behind(word, whole, at)
        ends.append(at)
    if at is None:
        return None
    return ends[1] - len(trace.strip()), ends[1]


def _behind(word: str, text: str, start: int) -> int | None:
    """Where `word` ends if it comes next, white space around it set aside."""
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
    """What the template writes behind an answer."""
    whole = _turn(prompt, _STAND_IN, place, tokenizer, thinking=thinking)
    _, found, end = whole.rpartition(_STAND_IN)
    if not found:
        raise InputError(
            f"{place}: the chat template does not write the answer as it is; use a"
            " template that does"
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
        # A layout of our own would be one the model has never seen and that no server
        # of the exported model would use, so it is not made up here.
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
            f"{place}: the chat template refuses it ({first_line(error)})"
        ) from None
