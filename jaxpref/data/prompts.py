"""Prompts to sample from."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxpref.data.bad_rows import BadRow, BadRows, log_skipped
from jaxpref.data.records import Example, parse_prompt, prompt_key, text_of
from jaxpref.data.records.dialogues import HUMAN_TURN
from jaxpref.data.records.reanswered import without_answers
from jaxpref.data.records.view import View
from jaxpref.data.sources import Source
from jaxpref.data.sources.json_files import decode_json
from jaxpref.data.tokenize import encode_prompt
from jaxpref.errors import InputError
from jaxpref.runtime.processes import log


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to be answered."""

    text: str
    """What it asks; of a conversation, the last message."""
    tokens: list[int]
    record: Mapping[str, Any]
    """The record that it comes from, for new answers; see `without_answers`."""
    source_record: Mapping[str, Any]
    """The record as in its file, which rewards read."""
    example: Example
    """The same as it is rendered: a text, or messages."""
    place: str
    """The record's file and row, for messages."""
    is_cut: bool = False
    """Whether tokens are missing because the prompt is too long."""


def read_prompts(
    source: Source,
    tokenizer: Any,
    *,
    limit: int | None = None,
    max_prompt_length: int | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    ignore_fields: Collection[str] = (),
    on_bad_row: str = "raise",
) -> tuple[list[Prompt], list[BadRow]]:
    """The distinct prompts of a source, tokenized as in training, and skipped rows.

    A record with completions is rendered exactly as in training.  One with a prompt
    alone is a user's turn if the prompt is a text and the model has a chat template.
    Of rows with the same prompt, the first counts; the log says how many others there
    are.

    Args:
      source: from `open_source`.
      tokenizer: from `load_tokenizer`.
      limit: maximum number of prompts, the first ones (default: all).
      max_prompt_length: longer prompts are cut as in training.
      raw: whether to leave texts as they are.
      thinking: `enable_thinking` for the chat template; None leaves it out.
      ignore_fields: fields of the records to ignore.
      on_bad_row: "raise" or "skip"; skipped rows are counted in the log.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    repeated: list[str] = []
    bad = BadRows(on_bad_row)
    for row in range(len(source)):
        place = source.location(row)
        example = bad.attempt(
            lambda row=row, place=place: parse_prompt(
                source[row], place, as_turns=not raw, ignore_fields=ignore_fields
            ),
            place,
        )
        if example is None:
            continue
        if prompt_key(example.prompt) in seen:
            repeated.append(place)
            continue
        seen.add(prompt_key(example.prompt))
        if not example.completions and not raw:
            example = as_user(example, tokenizer)
        example = _with_thinking(example, thinking)
        prompts.append(
            _prompt(example, source[row], place, tokenizer, max_prompt_length)
        )
        if len(prompts) == limit:
            break
    log_skipped(bad.found)
    if repeated:
        log(
            f"{len(repeated):,} of {len(prompts) + len(repeated):,} rows repeat a "
            f"prompt, such as {repeated[0]}; the first row of each prompt counts"
        )
    return prompts, bad.found


def given_prompts(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    raw: bool = False,
    thinking: bool | None = None,
) -> list[Prompt]:
    """Prompts typed by the user, tokenized as in training.

    For a model with a chat template, each is a user's turn, or a whole conversation as
    JSON: a list of messages.

    Args:
      texts: the prompts.
      tokenizer: from `load_tokenizer`.
      raw: whether to leave the texts as they are.
      thinking: `enable_thinking` for the chat template; None leaves it out.
    """
    prompts = []
    for number, text in enumerate(texts, start=1):
        place = f"--prompts {number}"
        example = Example(text, ())
        if not text.strip():
            raise InputError(f"{place}: is empty; write a prompt")
        if not raw:
            messages = _conversation(text, place)
            example = messages or as_user(example, tokenizer)
        example = _with_thinking(example, thinking)
        prompts.append(_prompt(example, {}, place, tokenizer, None))
    return prompts


def _prompt(
    example: Example,
    source: Mapping[str, Any],
    place: str,
    tokenizer: Any,
    max_length: int | None,
) -> Prompt:
    prompt = example.prompt
    text = prompt if isinstance(prompt, str) else text_of(prompt[-1])
    encode = functools.partial(encode_prompt, tokenizer, example, place=place)
    tokens = encode(max_prompt_length=max_length)
    # Only a prompt of the maximum length can have been cut.
    is_cut = len(tokens) == max_length and len(encode(max_prompt_length=None)) > len(
        tokens
    )
    record = without_answers(source, example)
    if isinstance(source, View):
        source = source.origin.record
    return Prompt(text, tokens, record, source, example, place, is_cut)


def with_system(prompt: Prompt, system: str, flag: str) -> Example:
    """The prompt with another system message, or with one if it has none.

    Args:
      prompt: from `read_prompts` or `given_prompts`.
      system: the message.
      flag: the option that gives it, for messages.

    Raises:
      InputError: if the prompt is a text, which has no system message.
    """
    example = prompt.example
    if isinstance(example.prompt, str):
        raise InputError(
            f"{flag}: prompts need a chat template to have a system message; leave it "
            "out"
        )
    turns = [x for x in example.prompt if x["role"] not in ("system", "developer")]
    first = {"role": "system", "content": system}
    return dataclasses.replace(example, prompt=(first, *turns))


def reworded(
    prompt: Prompt,
    reword: Callable[[str], str],
    tokenizer: Any,
    max_length: int,
    flag: str,
) -> Prompt:
    """The prompt with other words in place of its text, or of its last message.

    Args:
      prompt: from `read_prompts` or `given_prompts`; its text and example stay.
      reword: the new text from the old one.
      tokenizer: from `load_tokenizer`.
      max_length: the most tokens; the new words must not be cut.
      flag: the option that asks for it, for messages.

    Raises:
      InputError: if the last message is not a text of the user, or the new prompt has
        more tokens.
    """
    example = _with_last_message(prompt, reword, flag)
    tokens = encode_prompt(tokenizer, example, place=prompt.place)
    if len(tokens) > max_length:
        raise InputError(
            f"{prompt.place}: with the text of {flag}, the prompt has {len(tokens)} "
            f"tokens, but at most {max_length} fit; shorten it, or lower "
            "--max-new-tokens"
        )
    return dataclasses.replace(prompt, tokens=tokens)


def _with_last_message(
    prompt: Prompt, reword: Callable[[str], str], flag: str
) -> Example:
    example = prompt.example
    if isinstance(message := example.prompt, str):
        return dataclasses.replace(example, prompt=reword(message))
    *turns, last = message
    if last["role"] != "user" or not isinstance(last["content"], str):
        raise InputError(
            f"{prompt.place}: {flag} needs prompts that end with a text of the user"
        )
    turns = (*turns, {**last, "content": reword(last["content"])})
    return dataclasses.replace(example, prompt=turns)


def as_user(example: Example, tokenizer: Any) -> Example:
    """A text as a user's turn, if the model has a chat template.

    A text that has turns already, with the tokenizer's special tokens or as a dialogue,
    is used as it is, like in training.
    """
    text = example.prompt
    if not isinstance(text, str) or not tokenizer.chat_template:
        return example
    rendered = any(token in text for token in tokenizer.all_special_tokens)
    if rendered or text.lstrip().startswith(HUMAN_TURN):
        return example
    message = {"role": "user", "content": text}
    return dataclasses.replace(example, prompt=(message,))


def _with_thinking(example: Example, thinking: bool | None) -> Example:
    """The example with `enable_thinking` set for the chat template."""
    if thinking is None or not example.is_conversation:
        return example
    variables = example.variables | {"enable_thinking": thinking}
    return dataclasses.replace(example, variables=variables)


def _conversation(text: str, place: str) -> Example | None:
    """The conversation that a text contains as JSON, or None.

    It is a message, a list of messages, or a record with one of them.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = decode_json(text.encode(), place)
    except InputError:
        return None  # a prompt that begins with a bracket
    record = value if isinstance(value, dict) and "role" not in value else {}
    turns = record.get("messages") or record.get("prompt") or value
    turns = turns if isinstance(turns, list) else [turns]
    if not turns or not all(isinstance(x, dict) and "role" in x for x in turns):
        return None
    others = {k: v for k, v in record.items() if k not in ("messages", "prompt")}
    example = parse_prompt({"prompt": turns, **others}, place)
    if example is None:
        raise InputError(f"{place}: the conversation has no turn to answer")
    return example
