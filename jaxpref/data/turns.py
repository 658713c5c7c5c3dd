"""Several assistant turns of a conversation: where each is, and which tokens it has.

If the chat template has `{% generation %}` blocks, these say what the model writes, as
for `apply_chat_template(..., return_assistant_tokens_mask=True)`.  Otherwise, a turn
begins where the prompt before it ends, from which it would be sampled, and ends with
its stop token.  This requires that the template renders a turn in the same way whether
or not others follow it.  Some do not: they leave out the thinking of earlier turns.
"""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any

from jaxpref.data.answer_text import TraceMarkers, Turn, end_of_text
from jaxpref.data.cut import Parts
from jaxpref.data.end_of_turn import INNER_END, Ends
from jaxpref.data.records import Example, Message
from jaxpref.data.render import Texts, render_prompt, with_options
from jaxpref.data.template import (
    generation_blocks,
    has_generation_blocks,
    render_template,
)
from jaxpref.errors import InputError

_LAST = "or train on the last turn only (--train-turns last)"


def render_turns(
    example: Example, place: str, tokenizer: Any, markers: TraceMarkers
) -> Texts:
    """The text of conversations whose completions have several assistant turns.

    Args:
      example: with `turns`.
      place: "file row n", for errors.
      tokenizer: its chat template renders conversations.
      markers: the markers of thinking.

    Raises:
      InputError: as `render`, or if the template renders a turn differently once others
        follow it, and has no blocks that say where the turn is.
    """
    example = with_options(example, tokenizer)
    conversations = [
        _messages(example.prompt, *turns, answer)
        for turns, answer in zip(example.turns, example.completions, strict=True)
    ]
    first = len(example.prompt)
    firsts = tuple(messages[first] for messages in conversations)
    asked = dataclasses.replace(example, completions=firsts, turns=())
    prompt = render_prompt(asked, place, tokenizer, markers=markers)
    if has_generation_blocks(tokenizer):
        found = [
            _blocks(x, first, place, tokenizer, example.variables, markers)
            for x in conversations
        ]
        before = [whole[: turns[0].start] for whole, turns in found]
        prompt = os.path.commonprefix(before)
    else:
        found = [
            _prefixes(x, prompt, first, place, tokenizer, example.variables, markers)
            for x in conversations
        ]
    wholes, turns = zip(*found)
    ends = [own[-1].text_end for own in turns]
    return Texts(prompt, list(wholes), ends, turns=list(turns))


def _messages(prompt: str | Sequence[Message], *later: str | Message) -> list[Message]:
    return [x for x in (*prompt, *later) if not isinstance(x, str)]


def _blocks(
    messages: list[Message],
    first: int,
    place: str,
    tokenizer: Any,
    variables: dict[str, Any],
    markers: TraceMarkers,
) -> tuple[str, list[Turn]]:
    """The text, and the turns from message `first` on, as the template's blocks say."""
    whole, blocks = generation_blocks(messages, place, tokenizer, **variables)
    answers = [n for n, x in enumerate(messages) if x["role"] == "assistant"]
    if len(blocks) != len(answers):
        raise InputError(
            f"{place}: the chat template has {len(blocks)} generation blocks for"
            f" {len(answers)} assistant turns; use a template with one for each,"
            f" {_LAST}"
        )
    found = []
    for n, (start, end) in zip(answers, blocks):
        if n < first:
            continue
        text_end = end_of_text(messages[n], whole, start, markers, anywhere=True)
        if text_end is None or text_end > end:
            raise InputError(
                f"{place}: the chat template leaves out or changes part of message"
                f" {n + 1}, or writes it outside its generation block; use a template"
                f" that does not, {_LAST}"
            )
        found.append(Turn(start, text_end, end, is_block=True))
    return whole, found


def _prefixes(
    messages: list[Message],
    prompt: str,
    first: int,
    place: str,
    tokenizer: Any,
    variables: dict[str, Any],
    markers: TraceMarkers,
) -> tuple[str, list[Turn]]:
    """The text, and the turns from message `first` on, each after its own prompt."""
    render = lambda some: render_template(some, place, tokenizer, False, **variables)
    whole, found = render(messages), []
    for n in range(first, len(messages)):
        if messages[n]["role"] != "assistant":
            continue
        if n > first:
            asked = Example(tuple(messages[:n]), (messages[n],), variables=variables)
            prompt = render_prompt(asked, place, tokenizer, markers=markers)
        text_end, end = None, len(whole)
        if whole.startswith(prompt):
            text_end = end_of_text(
                *(messages[n], whole, len(prompt), markers),
                anywhere="enable_thinking" in variables,
            )
        if n < len(messages) - 1:
            end = len(os.path.commonprefix([whole, render(messages[: n + 1])]))
        if text_end is None or text_end > end:
            raise InputError(
                f"{place}: message {n + 1}: the chat template renders an answer"
                " differently within a conversation than right after its prompt"
                " (some leave out the thinking of earlier turns); use a template with"
                f" {{% generation %}} blocks, {_LAST}"
            )
        found.append(Turn(len(prompt), text_end, end))
    return whole, found


def with_masks(parts: Parts, place: str, tokenizer: Any, ends: Ends) -> Parts | str:
    """The tokens of an example, and which of its completions' tokens are trained on.

    A token is trained on if a character of it is in a turn, as in `transformers`.

    Args:
      parts: the tokens; their texts have turns.
      place: "file row n", for errors.
      tokenizer: which says what characters each token has.
      ends: of the tokenizer.

    Returns:
      The tokens with masks, or INNER_END if a turn has BOS or a stop token before its
      end.

    Raises:
      InputError: if the tokenizer cannot say it, or the template writes no stop token
        after a turn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{place}: the tokenizer does not say which characters a token has; use one"
            f" with tokenizer.json, {_LAST}"
        )
    masks = []
    texts = parts.texts
    for whole, turns, completion in zip(
        texts.wholes, texts.turns or (), parts.completions, strict=True
    ):
        encoded = tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        is_bos = (token == ends.bos for token in ids)
        start = sum(itertools.takewhile(bool, is_bos)) + len(parts.prompt)
        stop = start + len(completion)
        mask = [False] * stop
        for turn in turns:
            own = _tokens_of(turn, ids, offsets, ends)
            if own is None:
                return INNER_END
            if turn is turns[-1] and not turn.is_block:
                own = slice(own.start, stop)
            elif own.start == own.stop:
                raise InputError(
                    f"{place}: the chat template writes no stop token after an earlier"
                    f" turn of the assistant; use a template that does, {_LAST}"
                )
            # Tokens merged across the end of the prompt belong to the first turn.
            begin = start if turn is turns[0] else own.start
            mask[begin : own.stop] = [True] * (min(own.stop, stop) - begin)
        if stop > len(ids):  # EOS was appended
            mask[len(ids) :] = [True] * (stop - len(ids))
        masks.append(mask[start:stop])
    return dataclasses.replace(parts, masks=tuple(masks))


def _tokens_of(
    turn: Turn, ids: Sequence[int], offsets: Sequence[tuple[int, int]], ends: Ends
) -> slice | None:
    """The tokens of a turn, up to its stop token if it is no block.

    Empty if there is no stop token; None if there is one before the end of the text.
    """
    starts, stops = zip(*offsets)
    begin = bisect.bisect_right(stops, turn.start)
    after = bisect.bisect_left(starts, turn.text_end)
    end = bisect.bisect_left(starts, turn.end)
    if any(token in ids[begin:after] for token in (*ends.stops, ends.bos)):
        return None
    if turn.is_block:
        return slice(begin, end)
    found = (n + 1 for n in range(after, end) if ids[n] in ends.stops)
    return slice(begin, next(found, begin))
