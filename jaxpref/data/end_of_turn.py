"""Where an answer ends: one definition for training, sampling, and reward models.

A language model's answer ends with the first stop token that the chat template writes
after it, where a sampler stops.  If there is none, as for texts without a template, the
tokenizer's EOS is appended, which is a stop token too.

A reward model reads a conversation to the end of the template, since `transformers`
takes the score at the last token of `apply_chat_template(chat)`.  Nothing is appended.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.files import read_json

INNER_END = "a completion holds BOS or EOS before its end"


def read_stop_tokens(folder: Path) -> tuple[int, ...]:
    """The token ids that end a completion, as a model folder states them.

    These are `eos_token_id` in `generation_config.json`, or in `config.json` if the
    first has none.

    Raises:
      InputError: if one of the files is malformed.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            found = read_json(path).get("eos_token_id")
            if found is not None:
                tokens = found if isinstance(found, list) else [found]
                if not all(type(token) is int for token in tokens):
                    raise InputError(
                        f"{path}: field eos_token_id is {found!r}; give a token id "
                        "or a list of them"
                    )
                return tuple(tokens)
    return ()


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a turn: those of the model folder, and the tokenizer's EOS.

    Args:
      tokenizer: from `load_tokenizer`, which reads the model folder.
    """
    folder = getattr(tokenizer, "folder_stop_tokens", ())
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *folder)))


@dataclasses.dataclass(frozen=True)
class Ends:
    """The special tokens at the ends of texts; a tokenizer takes long to name them."""

    tokenizer: Any
    eos: int
    bos: int | None
    stops: tuple[int, ...]
    """See `stop_tokens`."""


def ends_of(tokenizer: Any) -> Ends:
    """The special tokens of a tokenizer from `load_tokenizer`."""
    own = tokenizer.eos_token_id, tokenizer.bos_token_id
    return Ends(tokenizer, *own, stop_tokens(tokenizer))


def end_text(completion: Sequence[int], ends: Ends) -> list[int]:
    """A text's completion with one stop token at its end.

    The text may already end with stop tokens, and whitespace after them, if it was
    rendered beforehand.
    """
    stops = ends.stops
    body, first = list(completion), ends.eos
    last = _last(body, stops)
    rest = body[last + 1 :]
    decode = ends.tokenizer.decode
    if last >= 0 and not decode(rest, skip_special_tokens=True).strip():
        body = body[: last + 1]
    while body and body[-1] in stops:
        first = body.pop()
    return [*body, first]


def end_turn(completion: Sequence[int], tail: Sequence[int], ends: Ends) -> list[int]:
    """A turn's completion up to the first stop token after its text.

    Args:
      completion: the tokens of the turn.
      tail: the tokens that the template writes after the text.
      ends: of the tokenizer.
    """
    stops = ends.stops
    first = next((n for n, token in enumerate(tail) if token in stops), None)
    if first is None:
        return end_text(completion, ends)
    # Stop tokens are never merged with their neighbors, so what follows is the same.
    after = len(tail) - first - 1
    return list(completion[: len(completion) - after])


def holds_an_end(completion: Sequence[int], ends: Ends) -> bool:
    """Whether BOS or a stop token comes before the last stop token of a completion."""
    last = _last(completion, ends.stops)
    inner = completion if last < 0 else completion[:last]
    return any(token in inner for token in (*ends.stops, ends.bos))


def _last(tokens: Sequence[int], wanted: Collection[int]) -> int:
    """The index of the last of the wanted tokens, or -1."""
    if not any(token in tokens for token in wanted):
        return -1
    return max(n for n, token in enumerate(tokens) if token in wanted)
