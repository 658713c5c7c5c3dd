"""From examples to tokens, with the model's own tokenizer.

Prompt and completion are tokenized as one text, since a tokenizer may merge across the
boundary.  The tokens are split at the longest prefix that they share with the tokens of
the prompt alone.  For a pair, it is the longest prefix that both sides share with it,
so that both sides have the same prompt.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpref.data.records import Example, Message
from jaxpref.data.render import THINK, Texts, TraceMarkers, render, render_prompt
from jaxpref.errors import InputError, first_line

NO_TOKENS = "a completion has no tokens"
NO_PROMPT = "the prompt has no tokens and the tokenizer has no BOS"
INNER_END = "a completion holds BOS or EOS before its end"
NO_ROOM = "the prompt leaves no room for the completion"
LONG_ANSWER = "an answer does not fit, even without any of its trace"
SAME_TOKENS = "chosen and rejected are identical once tokenized and cut"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenized example, and counts of what was cut."""

    prompt: list[int]
    completions: list[list[int]]
    prompt_cut: bool
    completions_cut: int
    traces_cut: int = 0


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model folder or Hub ID; never runs code from there.

    Raises:
      InputError: if there is none, or it has no end-of-sequence token.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    config_logger = logging.getLogger("transformers.configuration_utils")
    config_logger.addFilter(_is_not_about_the_model_type)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except Exception as error:  # the backends raise plain exceptions on a bad file
        raise InputError(
            f"{model}: no usable tokenizer ({first_line(error)})"
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{model}: the tokenizer has no end-of-sequence token, so no answer would"
            ' ever end; set "eos_token" in tokenizer_config.json'
        )
    return tokenizer


def _is_not_about_the_model_type(record: logging.LogRecord) -> bool:
    # The model itself is read by `models.folder`, which knows more types.
    return not record.getMessage().startswith("You are using a model of type")


def tokenize(
    examples: Sequence[Example],
    places: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    markers: TraceMarkers = THINK,
) -> list[Tokens | str]:
    """Tokenizes examples in one call of the tokenizer.

    There is one BOS at the start if the tokenizer defines one, whether or not it or the
    chat template adds it.  There is one EOS at the end of each completion that is not
    cut.  Special tokens written in a text become those tokens, as in other frameworks:
    a prompt may be a rendered chat, with the BOS and EOS of earlier turns.  An example
    is dropped if a completion contains BOS or EOS before its end, since what follows
    could be content or markup.

    A prompt longer than `max_prompt_length` is cut on the left, after its BOS.  A
    completion that then exceeds `max_length` is cut on the right and has no EOS, since
    the answer does not end there.  If it has a trace, the end of the trace is cut
    instead, as if a thinking budget had ended it; the closing marker and the answer
    follow in full.  The pair is dropped if an answer still does not fit, or does not
    fit after an empty trace: answers of a run that mixes traces are never cut.

    Args:
      examples: the examples, with at most one trace per side; see `expand`.
      places: "file row n" of each, for errors.
      tokenizer: a tokenizer of `transformers`.
      max_length: maximum tokens of prompt and completion, BOS and EOS included.
      max_prompt_length: maximum tokens of the prompt, BOS included.
      markers: the markers of traces.

    Returns:
      For each example its tokens, or the reason why it cannot be used.

    Raises:
      InputError: if an example is a conversation, and the tokenizer has no chat
        template or the template rejects it.
    """
    rendered = [
        render(example, place, tokenizer, markers)
        for example, place in zip(examples, places, strict=True)
    ]
    strings = [text for texts in rendered for text in (texts.prompt, *texts.wholes)]
    encoded = iter(_encode(strings, tokenizer))
    results: list[Tokens | str] = []
    for example, texts in zip(examples, rendered):
        prompt, *wholes = (next(encoded) for _ in (0, *texts.wholes))
        split = _split(prompt, wholes, tokenizer)
        results.append(
            split
            if isinstance(split, str)
            else _cut(*split, example, texts, tokenizer, max_length, max_prompt_length)
        )
    return results


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    place: str = "prompt",
    max_prompt_length: int | None = None,
    thinking: bool | None = None,
    markers: TraceMarkers = THINK,
) -> list[int]:
    """The tokens of a prompt to be answered, the same as in training.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt: a text, or messages for the chat template.
      place: names the prompt in errors.
      max_prompt_length: longer prompts are cut on the left, after BOS.
      thinking: True before a trace, False to end with an empty trace, None for data
        without traces; see `render_prompt`.
      markers: the markers of traces.

    Returns:
      Token ids, beginning with BOS if the tokenizer has one.
    """
    bos = tokenizer.bos_token_id
    text = render_prompt(prompt, place, tokenizer, thinking=thinking, markers=markers)
    (tokens,) = _encode([text], tokenizer)
    tokens = _without_leading(tokens, bos)
    start = [] if bos is None else [bos]
    if not start + tokens:
        raise InputError(f"{place}: {NO_PROMPT}")
    if max_prompt_length is not None:
        tokens = tokens[max(0, len(tokens) + len(start) - max_prompt_length) :]
    return start + tokens


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without added special tokens, which are added in this module."""
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _split(
    prompt: list[int], wholes: list[list[int]], tokenizer: Any
) -> tuple[list[int], list[list[int]]] | str:
    """Prompt without BOS, and completions with EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = _without_leading(prompt, bos)
    wholes = [_without_leading(whole, bos) for whole in wholes]
    shared = min(_common_prefix(prompt, whole) for whole in wholes)
    if not shared and bos is None:
        return NO_PROMPT
    completions = []
    for whole in wholes:
        completion = _end_of_turn(whole[shared:], tokenizer)
        while completion and completion[-1] == eos:
            completion.pop()
        if not completion:
            return NO_TOKENS
        if bos in completion or eos in completion:
            return INNER_END
        completions.append([*completion, eos])
    return prompt[:shared], completions


def _end_of_turn(completion: list[int], tokenizer: Any) -> list[int]:
    """Drops a line break or other markup that a template writes after EOS."""
    eos = tokenizer.eos_token_id
    if eos not in completion or completion[-1] == eos:
        return completion
    end = len(completion) - completion[::-1].index(eos)
    rest = tokenizer.decode(completion[end:], skip_special_tokens=True)
    return completion if rest.strip() else completion[:end]


def _cut(
    prompt: list[int],
    completions: list[list[int]],
    example: Example,
    texts: Texts,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
) -> Tokens | str:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    keep = max_prompt_length - len(start)
    prompt_cut = len(prompt) > keep
    kept = start + (prompt[len(prompt) - keep :] if prompt_cut else prompt)
    room = max_length - len(kept)
    if room < 1:
        return NO_ROOM
    too_long = sum(len(completion) > room for completion in completions)
    if too_long and example.empty:
        return LONG_ANSWER
    if too_long and texts.traces:
        cut = [
            _cut_trace(prompt, completion, whole, span, room, tokenizer)
            for completion, whole, span in zip(completions, texts.wholes, texts.traces)
        ]
        if not all(cut):
            return LONG_ANSWER
    else:
        cut = [completion[:room] for completion in completions]
    if len(cut) == 2 and cut[0] == cut[1]:
        return SAME_TOKENS
    by_trace = too_long if texts.traces else 0
    return Tokens(kept, cut, prompt_cut, too_long - by_trace, by_trace)


def _cut_trace(
    prompt: list[int],
    completion: list[int],
    whole: str,
    span: tuple[int, int],
    room: int,
    tokenizer: Any,
) -> list[int]:
    """The completion, without the last tokens of its trace if it is too long.

    Keeps a token that spans the end of the trace, and all tokens of the opening marker.
    Returns nothing if these and the answer are too long.
    """
    if len(completion) <= room:
        return completion
    opened, traced = (
        _without_leading(tokens, tokenizer.bos_token_id)
        for tokens in _encode([whole[:end] for end in span], tokenizer)
    )
    # As for prompts: the prefix of tokens shared with those of the whole text.
    end = _common_prefix(traced, prompt + completion) - len(prompt)
    rest = completion[max(end, 0) :]
    head = room - len(rest)
    if head < len(opened) - len(prompt) or head < 0:
        return []
    return completion[:head] + rest


def _without_leading(tokens: list[int], bos: int | None) -> list[int]:
    start = 0
    while bos is not None and start < len(tokens) and tokens[start] == bos:
        start += 1
    return tokens[start:]


def _common_prefix(first: list[int], second: list[int]) -> int:
    if second[: len(first)] == first:
        return len(first)
    for n, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return n
    return min(len(first), len(second))
