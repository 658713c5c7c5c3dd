"""Where an answer ends: one definition for training, sampling, and reward models.

A language model's answer ends with the first stop token that the chat template writes
after it, where a sampler stops.  If there is none, as for texts without a template, the
tokenizer's EOS is appended, which is a stop token too.

A reward model reads a conversation to the end of the template, since `transformers`
takes the score at the last token of `apply_chat_template(chat)`.  Nothing is appended.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.files import read_json


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


def end_text(completion: Sequence[int], tokenizer: Any) -> list[int]:
    """A text's completion with one stop token at its end.

    The text may already end with stop tokens, and whitespace after them, if it was
    rendered beforehand.
    """
    stops = stop_tokens(tokenizer)
    body, first = list(completion), tokenizer.eos_token_id
    last = _last(body, stops)
    rest = body[last + 1 :]
    if last >= 0 and not tokenizer.decode(rest, skip_special_tokens=True).strip():
        body = body[: last + 1]
    while body and body[-1] in stops:
        first = body.pop()
    return [*body, first]


def end_turn(
    completion: Sequence[int], tail: Sequence[int], tokenizer: Any
) -> list[int]:
    """A turn's completion up to the first stop token after its text.

    Args:
      completion: the tokens of the turn.
      tail: the tokens that the template writes after the text.
      tokenizer: from `load_tokenizer`.
    """
    stops = stop_tokens(tokenizer)
    first = next((n for n, token in enumerate(tail) if token in stops), None)
    if first is None:
        return end_text(completion, tokenizer)
    # Stop tokens are never merged with their neighbors, so what follows is the same.
    after = len(tail) - first - 1
    return list(completion[: len(completion) - after])


def holds_an_end(completion: Sequence[int], tokenizer: Any, *, bos: int | None) -> bool:
    """Whether BOS or a stop token comes before the last stop token of a completion."""
    marks = {*stop_tokens(tokenizer), bos}
    last = _last(completion, stop_tokens(tokenizer))
    inner = completion if last < 0 else completion[:last]
    return any(token in marks for token in inner)


def _last(tokens: Sequence[int], wanted: Collection[int]) -> int:
    """The index of the last of the wanted tokens, or -1."""
    return max((n for n, token in enumerate(tokens) if token in wanted), default=-1)
