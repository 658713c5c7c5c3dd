"""Prompts to sample from."""

from typing import Any

from jaxpref.data.options import DEFAULTS
from jaxpref.data.records import parse_prompt, prompt_key
from jaxpref.data.sources import Source
from jaxpref.data.tokenize import encode_prompt


def read_prompts(
    source: Source,
    tokenizer: Any,
    *,
    limit: int,
    max_prompt_length: int = DEFAULTS.longest_prompt,
) -> tuple[list[str], list[list[int]]]:
    """The first `limit` distinct prompts of a source, tokenized as in training.

    Returns:
      The text of each prompt (for a conversation, its last message), and its tokens.
    """
    texts: list[str] = []
    tokens: list[list[int]] = []
    seen: set[str] = set()
    for row in range(len(source)):
        place = source.location(row)
        prompt = parse_prompt(source[row], place)
        if prompt is None or prompt_key(prompt) in seen:
            continue
        seen.add(prompt_key(prompt))
        texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        tokens.append(
            encode_prompt(
                tokenizer, prompt, place=place, max_prompt_length=max_prompt_length
            )
        )
        if len(texts) == limit:
            break
    return texts, tokens
