"""From examples to text: chat templates, and reasoning traces between their markers.

A completion with a trace is `open trace close answer`, after the prompt.  A pair with
an empty trace has `open close` at the end of its prompt, so that the completion is the
answer alone.  BVPO (arXiv:2510.05095) calls this the empty-trace pair.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jaxpref.data.answer_text import (
    THINK,
    TraceMarkers,
    Turn,
    end_of_text,
    end_of_word,
    ends_with,
    has_thought,
    missing_part,
    trace_span,
)
from jaxpref.data.records import THOUGHT_FIELDS, Example, Message, text_of
from jaxpref.data.template import render_template as _template
from jaxpref.errors import InputError

_STAND_IN = "TheAnswerStandsHere"


@dataclasses.dataclass(frozen=True)
class Texts:
    """One example as text."""

    prompt: str
    wholes: list[str]
    """The prompt with each completion."""
    ends: list[int]
    """Where the text of each completion ends, in characters of the whole; what follows
    was written by the chat template."""
    traces: list[tuple[int, int]] | None = None
    """Start and end of the trace in each whole, in characters; None without traces."""
    turns: Sequence[Sequence[Turn]] = ()
    """The turns of each whole that are trained on; empty if only its last one is."""


def render(
    example: Example,
    place: str,
    tokenizer: Any,
    markers: TraceMarkers = THINK,
    *,
    whole_turns: bool = False,
) -> Texts:
    """The text of the prompt, and of the prompt with each completion.

    The prompt is that of `render_prompt`, from which the model will be sampled.  Each
    answer is found in what the template renders.  Some templates omit an answer's
    thinking, or begin an answer differently when they ask for one.  The turn is then
    assembled here as it will be sampled: the prompt, the answer, and the template's end
    of a turn.

    Templates that support `enable_thinking` are given true before a trace and false
    before an empty one; other examples are rendered without it.

    Args:
      example: an example with at most one trace per side; see `expand`.
      place: "file row n", for errors.
      tokenizer: its chat template renders conversations.
      markers: the markers of traces.
      whole_turns: whether a conversation is rendered as reward models are given it, in
        one call of the template with the answer.

    Raises:
      InputError: if the example is a conversation, and the tokenizer has no chat
        template, or the template rejects it or leaves out part of an answer.
    """
    example = with_options(example, tokenizer)
    if example.traces:
        return _with_traces(example, place, tokenizer, markers)
    if example.empty:
        return _with_empty_trace(example, place, tokenizer, markers)
    if isinstance(example.prompt, str):
        wholes = [example.prompt + x for x in example.texts]
        return Texts(example.prompt, wholes, [len(whole) for whole in wholes])
    if whole_turns:
        return _whole_turns(example, place, tokenizer, markers)
    prompt = render_prompt(example, place, tokenizer, markers=markers)
    messages = _messages(example.completions)
    ended = example.ended or (True,) * len(messages)
    answers = [
        _answer(example, message, prompt, place, tokenizer, markers, complete=complete)
        for message, complete in zip(messages, ended, strict=True)
    ]
    return Texts(prompt, [whole for whole, _ in answers], [end for _, end in answers])


def render_prompt(
    example: Example,
    place: str,
    tokenizer: Any,
    *,
    thinking: bool | None = None,
    markers: TraceMarkers = THINK,
) -> str:
    """The text of a prompt to be answered, for training and for sampling.

    For a conversation, it is the template's generation prompt and whatever the template
    then writes before every answer.  This may be an empty thinking block, if the model
    can think but the answers in the data contain no thinking.

    Args:
      example: its prompt is rendered.  Its completions, if it has any, only say whether
        answers contain thinking.
      place: "file row n", for errors.
      tokenizer: whose chat template renders messages.
      thinking: True before a trace; False to end with an empty trace; None for data
        without traces.  For False, no markers are added if the template's text depends
        on `enable_thinking`, since it then has its own convention.
      markers: the markers of traces; those already at the end are not repeated.
    """
    example = with_options(example, tokenizer)
    prompt, variables = example.prompt, example.variables
    if isinstance(prompt, str):
        return prompt + _empty(prompt, markers) if thinking is False else prompt
    _check_variables(example, place, tokenizer, markers)
    if thinking is None:
        text = _template(prompt, place, tokenizer, True, **variables)
        _check_prompt(_messages(prompt), text, place, markers)
        thoughts = any(has_thought(x, markers) for x in example.completions)
        # With an explicit `enable_thinking`, the template's own prompt is asked for.
        if thoughts or "enable_thinking" in variables:
            return text
        opening = _before_answer(prompt, place, tokenizer, variables)
        # Tokenizers join a space with the word after it.
        return opening.rstrip(" \t") if opening.startswith(text) else text
    if variables.get("enable_thinking", thinking) is not thinking:
        raise InputError(
            f"{place}: chat_template_kwargs sets enable_thinking to"
            f" {variables['enable_thinking']}, but the answers have"
            f" {'traces' if thinking else 'an empty trace'}; remove one of the two"
        )
    set_to = lambda value: variables | {"enable_thinking": value}
    text = _template(prompt, place, tokenizer, True, **set_to(thinking))
    _check_prompt(_messages(prompt), text, place, markers)
    if thinking or text != _template(prompt, place, tokenizer, True, **set_to(True)):
        return text
    return text + _empty(text, markers)


def with_options(example: Example, tokenizer: Any) -> Example:
    """The example with the run's variables of the chat template; its own come first."""
    options = getattr(tokenizer, "template_options", None)
    if not options or not example.is_conversation:
        return example
    return dataclasses.replace(example, variables=options | example.variables)


def _check_variables(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> None:
    """Refuses variables that the chat template does not read, or that contradict."""
    template = str(tokenizer.chat_template or "")
    for name in example.variables:
        if template and name not in template:
            raise InputError(
                f"{place}: the chat template does not read '{name}'; remove it from the"
                " record, or use a template that reads it"
            )
    thoughts = any(has_thought(x, markers) for x in example.completions)
    if thoughts and example.variables.get("enable_thinking") is False:
        raise InputError(
            f"{place}: chat_template_kwargs sets enable_thinking to false, but an"
            " answer contains thinking; remove one of the two"
        )


def _check_prompt(
    messages: Sequence[Message], text: str, place: str, markers: TraceMarkers
) -> None:
    """Refuses a prompt of which the chat template leaves out a part."""
    for number, message in enumerate(messages, start=1):
        missing = missing_part(message, text, markers)
        if missing is not None:
            raise InputError(
                f"{place}: the chat template leaves out or changes part of message"
                f" {number} of the prompt ({message['role']}: {missing[:40]!r}); use a"
                " template that renders it, or remove the row"
            )


def _messages(turns: Sequence[str | Message]) -> list[Message]:
    """The turns of a conversation, none of which is a text."""
    return [message for message in turns if not isinstance(message, str)]


def _whole_turns(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> Texts:
    """The conversations as one call of the template renders them."""
    messages, variables = _messages(example.prompt), example.variables
    answers = _messages(example.completions)
    wholes = [
        _template([*messages, answer], place, tokenizer, False, **variables)
        for answer in answers
    ]
    prompt = _before_answer(messages, place, tokenizer, variables)
    if not prompt or not all(whole.startswith(prompt) for whole in wholes):
        prompt = os.path.commonprefix(wholes)
        question = _template(messages, place, tokenizer, False, **variables)
        prompt = os.path.commonprefix([prompt, question])
    ends = []
    for answer, whole in zip(answers, wholes):
        end = end_of_text(answer, whole, len(prompt), markers, anywhere=True)
        if end is None:
            raise InputError(
                f"{place}: the chat template leaves out or changes part of an answer,"
                " and a reward model is given what the template renders; use a template"
                " that renders all of it, or remove the row"
            )
        ends.append(end)
    return Texts(prompt, wholes, ends)


def _answer(
    example: Example,
    message: Message,
    prompt: str,
    place: str,
    tokenizer: Any,
    markers: TraceMarkers,
    *,
    complete: bool,
) -> tuple[str, int]:
    """The prompt with an answer, and where the text of the answer ends."""
    messages, variables = _messages(example.prompt), example.variables
    whole = _template([*messages, message], place, tokenizer, False, **variables)
    if whole.startswith(prompt):
        explicit = "enable_thinking" in variables
        end = end_of_text(message, whole, len(prompt), markers, anywhere=explicit)
        if end is not None:
            return whole, end
    else:
        # The text before the answer must be the same, except for an EOS that ends a
        # conversation without an answer.
        question = _template(messages, place, tokenizer, False, **variables).rstrip()
        question = question.removesuffix(tokenizer.eos_token).rstrip()
        if not all(text.startswith(question) for text in (prompt, whole)):
            raise InputError(
                f"{place}: the chat template writes the prompt differently if an"
                " answer follows it; use a template that writes it the same way"
            )
    left_out = [x for x in ("tool_calls", *THOUGHT_FIELDS) if message.get(x)]
    if left_out:
        raise InputError(
            f"{place}: the chat template leaves out or changes part of an answer with"
            f" '{left_out[0]}'; use a template that renders it, or remove the row"
        )
    end = _end_of_turn(messages, place, tokenizer, **variables)
    answer = _as_sampled(text_of(message), prompt, place, markers, complete=complete)
    head = prompt + answer
    return head + end, len(head)


def _as_sampled(
    content: str, prompt: str, place: str, markers: TraceMarkers, *, complete: bool
) -> str:
    """An answer as the model would write it after a prompt that may open thinking."""
    if not ends_with(prompt, markers.open):
        return content
    if complete and markers.close.strip() not in content:
        raise InputError(
            f"{place}: the chat template's prompt opens thinking with {markers.open},"
            f" which the answer does not close; write {markers.open}{markers.close}"
            " before answers without thinking, or use a template that does not"
        )
    opened = content.lstrip()
    if not opened.startswith(markers.open.strip()):
        return content
    thought = opened.removeprefix(markers.open.strip())
    return thought.lstrip() if prompt[-1].isspace() else thought


def _with_traces(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> Texts:
    prompt = render_prompt(example, place, tokenizer, thinking=True, markers=markers)
    variables = example.variables | {"enable_thinking": True}
    opening = "" if ends_with(prompt, markers.open) else markers.open
    wholes, ends, spans = [], [], []
    for (trace,), answer in zip(example.traces, example.texts):
        tail, kept = "", None
        if not isinstance(example.prompt, str):
            content = markers.open + trace + markers.close + answer
            whole = _turn(example.prompt, content, place, tokenizer, **variables)
            kept = trace_span(whole, prompt, opening, trace, markers.close, answer)
        if kept is None:
            if not isinstance(example.prompt, str):
                tail = _end_of_turn(example.prompt, place, tokenizer, **variables)
            head = prompt + opening
            text = head + trace + markers.close + answer
            whole = text + tail
            kept = (len(head), len(head) + len(trace), len(text))
        wholes.append(whole)
        spans.append(kept[:2])
        ends.append(kept[2])
    return Texts(prompt, wholes, ends, spans)


def _with_empty_trace(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> Texts:
    prompt = render_prompt(example, place, tokenizer, thinking=False, markers=markers)
    if isinstance(example.prompt, str):
        wholes = [prompt + answer for answer in example.texts]
        return Texts(prompt, wholes, [len(whole) for whole in wholes])
    variables = example.variables | {"enable_thinking": False}
    wholes, ends = [], []
    for answer in example.texts:
        whole = _turn(example.prompt, answer, place, tokenizer, **variables)
        starts = whole.startswith(prompt)
        end = end_of_word(answer, whole, len(prompt)) if starts else None
        if end is None:
            tail = _end_of_turn(example.prompt, place, tokenizer, **variables)
            whole, end = prompt + answer + tail, len(prompt + answer)
        wholes.append(whole)
        ends.append(end)
    return Texts(prompt, wholes, ends)


def _empty(prompt: str, markers: TraceMarkers) -> str:
    """The markers that this prompt still lacks to end with an empty trace."""
    if ends_with(prompt, markers.close):
        before = prompt.rstrip().removesuffix(markers.close.strip())
        if ends_with(before, markers.open):
            return ""
    opened = ends_with(prompt, markers.open)
    return markers.close if opened else markers.open + markers.close


def _turn(
    prompt: Sequence[Message],
    content: str,
    place: str,
    tokenizer: Any,
    **variables: Any,
) -> str:
    messages = [*prompt, {"role": "assistant", "content": content}]
    return _template(messages, place, tokenizer, False, **variables)


def _end_of_turn(
    prompt: Sequence[Message], place: str, tokenizer: Any, **variables: Any
) -> str:
    """The text that the template writes after an answer."""
    whole = _turn(prompt, _STAND_IN, place, tokenizer, **variables)
    _, found, end = whole.rpartition(_STAND_IN)
    if not found:
        raise InputError(
            f"{place}: the chat template changes the text of the answer; use a"
            " template that does not"
        )
    return end


def _before_answer(
    prompt: Sequence[Message], place: str, tokenizer: Any, variables: dict[str, Any]
) -> str:
    """The text before an answer without thinking; empty if it cannot be known."""
    try:
        whole = _turn(prompt, _STAND_IN, place, tokenizer, **variables)
    except InputError:  # some templates accept only the turns that they can render
        return ""
    return whole.rpartition(_STAND_IN)[0]
