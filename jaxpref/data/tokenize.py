"""From examples to tokens, with the model's own tokenizer.

Prompt and completion are tokenized as one text, since a tokenizer may merge across the
boundary.  The tokens are split at the longest prefix that they share with the tokens of
the prompt alone.  For a pair, it is the longest prefix that both sides share with it,
so that both sides have the same prompt.

`cut` says what happens to examples that are too long, and `end_of_turn` where an answer
ends.
"""

import dataclasses
import functools
import logging
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.data.cut import NO_ROOM, Limits, Parts, fitted
from jaxpref.data.end_of_turn import (
    INNER_END,
    Ends,
    end_text,
    end_turn,
    ends_of,
    holds_an_end,
    read_stop_tokens,
)
from jaxpref.data.records import Example, Message
from jaxpref.data.render import THINK, Texts, TraceMarkers, render, render_prompt
from jaxpref.data.tokens import SAME_TOKENS, Tokens, tokenize_sides
from jaxpref.data.turns import render_turns, with_masks
from jaxpref.errors import InputError, first_line

NO_TOKENS = "a completion has no tokens"
NO_PROMPT = "the prompt has no tokens and the tokenizer has no BOS"
LONG_ANSWER = "an answer does not fit, even without any of its trace"


def load_tokenizer(
    model: str | Path, template: Mapping[str, Any] = types.MappingProxyType({})
) -> Any:
    """The tokenizer of a model folder or Hub ID; never runs code from there.

    It also gets the stop tokens of the folder, for `end_of_turn.stop_tokens`, and the
    variables of the chat template, for `render`.

    Args:
      model: the folder or ID.
      template: variables for all records; see `RecordOptions.template_options`.

    Raises:
      InputError: if there is none, or it has no end-of-sequence token, or the folder's
        stop tokens cannot be read, or its chat template does not read a variable.
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
    tokenizer.folder_stop_tokens = read_stop_tokens(Path(model))
    for name in template:
        if name not in str(tokenizer.chat_template or ""):
            raise InputError(
                f"--template.{name}: the chat template of {model} does not read it; "
                "leave it out, or use a template that reads it"
            )
    tokenizer.template_options = dict(template)
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
    max_prompt_length: int | None = None,
    markers: TraceMarkers = THINK,
    whole_turns: bool = False,
) -> list[Tokens | str]:
    """Tokenizes examples in one call of the tokenizer.

    A text has one BOS at its start if the tokenizer defines one, whether or not the
    text has it; in a conversation, the chat template decides, as it does when the model
    is served.  A completion that is not cut ends as `end_of_turn` says.  Special tokens
    written in a text become those tokens, as in other frameworks: a prompt may be a
    rendered chat, with the BOS and EOS of earlier turns.  An example is dropped if a
    completion contains BOS or a stop token before its end, since what follows could be
    content or markup.

    An example that does not fit is cut as `cut` says; a prompt without turns loses its
    first tokens, after BOS.  A completion that is cut on the right has no stop token,
    since the answer does not end there.  If it has a trace, the end of the trace is cut
    instead, as if a thinking budget had ended it; the closing marker and the answer
    follow in full.  The pair is dropped if an answer still does not fit, or does not
    fit after an empty trace: answers of a run that mixes traces are never cut.

    Args:
      examples: the examples, with at most one trace per side; see `expand`.
      places: "file row n" of each, for errors.
      tokenizer: from `load_tokenizer`.
      max_length: maximum tokens of prompt and completion, BOS and EOS included.
      max_prompt_length: maximum tokens of the prompt, BOS included (default: what the
        completions leave of `max_length`, at least half).
      markers: the markers of traces.
      whole_turns: whether a turn ends where the template ends, as a reward model reads
        it, instead of at its first stop token.

    Returns:
      For each example its tokens, or the reason why it cannot be used.

    Raises:
      InputError: if an example is a conversation, and the tokenizer has no chat
        template or the template rejects it.
    """
    if any(example.own_prompts for example in examples):
        again = functools.partial(
            tokenize,
            tokenizer=tokenizer,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            markers=markers,
            whole_turns=whole_turns,
        )
        return tokenize_sides(examples, places, again)
    limits = Limits(max_length, max_prompt_length)
    split = functools.partial(
        _tokens, tokenizer=tokenizer, markers=markers, whole_turns=whole_turns
    )
    results: list[Tokens | str] = []
    for example, place, parts in zip(examples, places, split(examples, places)):
        again = lambda other, place=place: split([other], [place])[0]
        parts, dropped, cut = fitted(example, parts, limits, tokenizer, again)
        if isinstance(parts, str):
            results.append(parts)
            continue
        found = _cut(parts, example, limits, tokenizer)
        if not isinstance(found, str):
            found = dataclasses.replace(
                found, prompt_cut=found.prompt_cut or cut, turns_dropped=dropped
            )
        results.append(found)
    return results


def encode_prompt(
    tokenizer: Any,
    prompt: str | Example | Sequence[Message],
    *,
    place: str = "prompt",
    max_prompt_length: int | None = None,
    thinking: bool | None = None,
    markers: TraceMarkers = THINK,
) -> list[int]:
    """The tokens of a prompt to be answered, the same as in training.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt: a text, messages for the chat template, or an example, whose completions
        say whether answers contain thinking.
      place: names the prompt in errors.
      max_prompt_length: longer prompts are cut as in training.
      thinking: True before a trace, False to end with an empty trace, None for data
        without traces; see `render_prompt`.
      markers: the markers of traces.

    Returns:
      Token ids.
    """
    if not isinstance(prompt, Example):
        prompt = Example(prompt if isinstance(prompt, str) else tuple(prompt), ())

    def encoded(example: Example) -> Parts | str:
        text = render_prompt(
            example, place, tokenizer, thinking=thinking, markers=markers
        )
        texts = [text, text + "a"] if text.endswith(" ") else [text]
        tokens, *followed = _encode(texts, tokenizer)
        if followed:  # a space is merged with the word after it
            tokens = tokens[: _common_prefix(tokens, followed[0])]
        start = _start(example, tokens, tokenizer.bos_token_id)
        tokens = _without_leading(tokens, tokenizer.bos_token_id)
        return Parts(start, tokens, [], Texts(text, [], []))

    parts = encoded(prompt)
    if max_prompt_length is not None:
        limits = Limits(max_prompt_length, max_prompt_length)
        parts, _, _ = fitted(prompt, parts, limits, tokenizer, encoded)
    if isinstance(parts, str):
        raise InputError(f"{place}: {parts}")
    tokens = parts.prompt
    if max_prompt_length is not None:
        tokens = tokens[max(0, len(tokens) + len(parts.start) - max_prompt_length) :]
    if not parts.start + tokens:
        raise InputError(f"{place}: {NO_PROMPT}")
    return parts.start + tokens


def _tokens(
    examples: Sequence[Example],
    places: Sequence[str],
    *,
    tokenizer: Any,
    markers: TraceMarkers,
    whole_turns: bool,
) -> list[Parts | str]:
    """The tokens of each example, not yet cut, or the reason to drop it."""
    rendered = [
        render_turns(example, place, tokenizer, markers)
        if example.turns
        else render(example, place, tokenizer, markers, whole_turns=whole_turns)
        for example, place in zip(examples, places, strict=True)
    ]
    rendered = [
        _left_open(example, texts) for example, texts in zip(examples, rendered)
    ]
    tails = {x[end:] for t in rendered for x, end in zip(t.wholes, t.ends)} - {""}
    tail_tokens = dict(zip(tails, _encode(list(tails), tokenizer))) | {"": []}
    strings = [text for texts in rendered for text in (texts.prompt, *texts.wholes)]
    encoded, ends = iter(_encode(strings, tokenizer)), ends_of(tokenizer)
    results = []
    for example, place, texts in zip(examples, places, rendered):
        prompt, *wholes = (next(encoded) for _ in (0, *texts.wholes))
        rests = [tail_tokens[x[end:]] for x, end in zip(texts.wholes, texts.ends)]
        found = _split(example, texts, prompt, wholes, rests, ends, whole_turns)
        if texts.turns and not isinstance(found, str):
            found = with_masks(found, place, tokenizer, ends)
        results.append(found)
    return results


def _left_open(example: Example, texts: Texts) -> Texts:
    """The texts without what the template writes after answers that did not end."""
    if not example.ended:
        return texts
    wholes = [
        whole if complete else whole[:end]
        for whole, end, complete in zip(texts.wholes, texts.ends, example.ended)
    ]
    return dataclasses.replace(texts, wholes=wholes)


def _start(example: Example, prompt: list[int], bos: int | None) -> list[int]:
    """BOS if the example begins with it; see `tokenize`."""
    if bos is None or (example.is_conversation and prompt[:1] != [bos]):
        return []
    return [bos]


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
    example: Example,
    texts: Texts,
    prompt: list[int],
    wholes: list[list[int]],
    tails: list[list[int]],
    ends: Ends,
    whole_turns: bool,
) -> Parts | str:
    """Prompt without BOS, and completions with their ends."""
    bos = ends.bos
    start = _start(example, prompt, bos)
    prompt = _without_leading(prompt, bos)
    wholes = [_without_leading(whole, bos) for whole in wholes]
    shared = min(_common_prefix(prompt, whole) for whole in wholes)
    if not shared and not start:
        return NO_PROMPT
    completions = []
    ended = example.ended or (True,) * len(wholes)
    for whole, tail, complete in zip(wholes, tails, ended, strict=True):
        completion = whole[shared:]
        inner = completion
        if complete and not example.is_conversation:
            inner = completion = end_text(completion, ends)
        elif complete and not whole_turns:
            inner = completion = end_turn(completion, tail, ends)
        elif complete:  # what the template writes after the answer may have several
            inner = completion[: len(completion) - len(tail)]
        if not completion or completion[0] in ends.stops:
            return NO_TOKENS
        if not texts.turns and holds_an_end(inner, ends):
            return INNER_END
        completions.append(completion)
    return Parts(start, prompt[:shared], completions, texts)


def _cut(
    parts: Parts, example: Example, limits: Limits, tokenizer: Any
) -> Tokens | str:
    prompt, completions = parts.prompt, parts.completions
    excess = parts.excess(limits)
    kept = parts.start + prompt[max(0, excess) :]
    room = limits.whole - len(kept)
    if room < 1 or (prompt and excess >= len(prompt)):
        return NO_ROOM
    too_long = sum(len(completion) > room for completion in completions)
    if too_long and example.empty:
        return LONG_ANSWER
    spans = parts.texts.traces
    if too_long and spans:
        wholes = parts.texts.wholes
        cut = [
            _cut_trace(prompt, completion, whole, span, room, tokenizer)
            for completion, whole, span in zip(completions, wholes, spans)
        ]
        if not all(cut):
            return LONG_ANSWER
    else:
        cut = [completion[:room] for completion in completions]
    if len(cut) == 2 and cut[0] == cut[1]:
        return SAME_TOKENS
    masks = tuple(mask[:room] for mask in parts.masks)
    if not all(map(any, masks)):
        return NO_ROOM
    by_trace = too_long if spans else 0
    cuts = excess > 0, too_long - by_trace, by_trace
    return Tokens(kept, cut, *cuts, masks=masks)


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
