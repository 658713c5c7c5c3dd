"""From examples to tokens, with the model's own tokenizer.

Prompt and completion are tokenised as ONE text, since a tokenizer merges across the
boundary, and split at the longest prefix that the tokens of the whole text share with
the tokens of the prompt alone; for a pair, at the longest prefix that both sides share
with it, so that both sides have the same prompt.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jaxpref.data.formats import Example, Message
from jaxpref.errors import InputError

NO_TOKENS = "a completion has no tokens"
NO_PROMPT = "the prompt has no tokens and the tokenizer has no BOS"
NO_ROOM = "the prompt leaves no room for the completion"
SAME_TOKENS = "chosen and rejected are identical once tokenised and cut"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One tokenised example and what was cut from it."""

    prompt: list[int]
    completions: list[list[int]]
    prompt_cut: bool
    completions_cut: int


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model folder or hub id; no code from there is ever run.

    Raises:
      InputError: there is none, or it has no end-of-sequence token.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except Exception as error:  # the backends raise plain exceptions on a bad file
        line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(f"{model}: no usable tokenizer ({line})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{model}: the tokenizer has no end-of-sequence token, so no answer would"
            ' ever end; set "eos_token" in tokenizer_config.json'
        )
    return tokenizer


def tokenize(
    examples: Sequence[Example],
    places: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
) -> list[Tokens | str]:
    """Tokenise examples in two calls of the tokenizer.

    BOS: once, at the start, wherever the tokenizer defines one, whether it or the chat
    template adds it or not.  EOS: once, at the end of each completion that is not cut.
    A prompt longer than `max_prompt_length` loses tokens on the left, behind its BOS.
    A completion that then ends beyond `max_length` loses tokens on the right, its EOS
    among them: a cut answer does not end there, and no EOS is put in its place.

    Args:
      examples: what to tokenise.
      places: "file row n" of each, for errors.
      tokenizer: of `transformers`.
      max_length: most tokens of prompt and completion together, BOS and EOS included.
      max_prompt_length: most tokens of the prompt, BOS included.

    Returns:
      For each example its tokens, or the reason why it cannot be used.

    Raises:
      InputError: a conversation, and the tokenizer has no chat template or it refuses.
    """
    texts: list[str] = []
    for example, place in zip(examples, places, strict=True):
        texts += render(example, place, tokenizer)
    encoded = iter(_encode(texts, tokenizer))
    results: list[Tokens | str] = []
    for example in examples:
        prompt, *wholes = (next(encoded) for _ in (0, *example.completions))
        split = _split(prompt, wholes, example.is_conversation, tokenizer)
        results.append(
            split
            if isinstance(split, str)
            else _cut(*split, tokenizer.bos_token_id, max_length, max_prompt_length)
        )
    return results


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    place: str = "prompt",
    max_prompt_length: int | None = None,
) -> list[int]:
    """A prompt to be answered, with the tokens it would have in training.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt: a text, or messages for the chat template.
      place: names the prompt in errors.
      max_prompt_length: tokens beyond it are cut on the left, behind BOS.

    Returns:
      Token ids, BOS first where the tokenizer has one.
    """
    bos = tokenizer.bos_token_id
    if not isinstance(prompt, str):
        prompt = _template(list(prompt), place, tokenizer, True)
    (tokens,) = _encode([prompt], tokenizer)
    tokens = _without_leading(tokens, bos)
    start = [] if bos is None else [bos]
    if not start + tokens:
        raise InputError(f"{place}: {NO_PROMPT}")
    if max_prompt_length is not None:
        tokens = tokens[max(0, len(tokens) + len(start) - max_prompt_length) :]
    return start + tokens


def render(example: Example, place: str, tokenizer: Any) -> list[str]:
    """The text of the prompt, then of the prompt with each completion."""
    if not example.is_conversation:
        return [example.prompt, *(example.prompt + x for x in example.completions)]
    prompt = _template(list(example.prompt), place, tokenizer, True)
    wholes = [
        _template([*example.prompt, message], place, tokenizer, False)
        for message in example.completions
    ]
    # Some templates open the answer differently or drop earlier thoughts once there is
    # an answer; the question itself must read the same.
    question = example.prompt[-1]["content"].strip()
    for whole in wholes:
        if not whole.startswith(prompt):
            if question not in os.path.commonprefix([prompt, whole]):
                raise InputError(
                    f"{place}: the chat template writes the prompt differently when an"
                    " answer follows it; use a template that does not"
                )
    return [prompt, *wholes]


def _template(messages: list, place: str, tokenizer: Any, open_answer: bool) -> str:
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
            messages, tokenize=False, add_generation_prompt=open_answer
        )
    except (TemplateError, TypeError, ValueError) as error:
        line = str(error).strip().split("\n")[0]
        raise InputError(f"{place}: the chat template refuses it ({line})") from None


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without added special tokens; those are put in place here."""
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
    prompt: list[int], wholes: list[list[int]], is_conversation: bool, tokenizer: Any
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
        completion = whole[shared:]
        if is_conversation:
            completion = _end_of_turn(completion, tokenizer)
        while completion and completion[-1] == eos:
            completion.pop()
        if not completion:
            return NO_TOKENS
        completions.append([*completion, eos])
    return prompt[:shared], completions


def _end_of_turn(completion: list[int], tokenizer: Any) -> list[int]:
    """Drop the line break that a template writes after EOS."""
    eos = tokenizer.eos_token_id
    if eos not in completion:
        return completion
    end = len(completion) - completion[::-1].index(eos)
    if end < len(completion) and not tokenizer.decode(completion[end:]).strip():
        return completion[:end]
    return completion


def _cut(
    prompt: list[int],
    completions: list[list[int]],
    bos: int | None,
    max_length: int,
    max_prompt_length: int,
) -> Tokens | str:
    start = [] if bos is None else [bos]
    keep = max_prompt_length - len(start)
    prompt_cut = len(prompt) > keep
    prompt = start + (prompt[len(prompt) - keep :] if prompt_cut else prompt)
    room = max_length - len(prompt)
    if room < 1:
        return NO_ROOM
    cut = [completion[:room] for completion in completions]
    if len(cut) == 2 and cut[0] == cut[1]:
        return SAME_TOKENS
    completions_cut = sum(len(completion) > room for completion in completions)
    return Tokens(prompt, cut, prompt_cut, completions_cut)


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
