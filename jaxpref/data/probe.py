"""Checks that a reward model gives the same scores in `transformers`."""

from pathlib import Path
from typing import Any

from jaxpref.data.records import Example, Message
from jaxpref.data.template import render_template
from jaxpref.data.tokenize import load_tokenizer, tokenize
from jaxpref.errors import InputError
from jaxpref.runtime.processes import log

CHAT: tuple[Message, ...] = (
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
)
SYSTEM: Message = {"role": "system", "content": "Answer questions."}
"""Some templates require such a turn."""


def check_exported(folder: Path) -> None:
    """`check_rendering` with the tokenizer of an exported reward model."""
    tokenizer = load_tokenizer(folder)
    check_rendering(tokenizer, str(folder), padding=tokenizer.pad_token_id)


def check_rendering(tokenizer: Any, name: str, *, padding: int | None) -> None:
    """Compares the tokens of a short chat with those of `apply_chat_template(chat)`.

    That is what `transformers` users score.  All tokens must be the same as in
    training, and the last one, where the score is read, must not be padding.  A
    template that accepts no such chat, since it requires tools for example, is not
    checked.

    Args:
      tokenizer: from `load_tokenizer`.
      name: the model, for messages.
      padding: the token that pads the input of the exported model.

    Raises:
      InputError: if they differ.
    """
    if not tokenizer.chat_template:
        return
    place = f"{name}: a short chat"
    chat = _accepted(tokenizer, place)
    if chat is None:
        log(f"{name}: the chat template accepts no short chat, so it is not checked")
        return
    example = Example(chat[:-1], chat[-1:])
    (ours,) = tokenize(
        [example], [place], tokenizer, max_length=1 << 20, whole_turns=True
    )
    if isinstance(ours, str):
        raise InputError(f"{place}: {ours}")
    options = getattr(tokenizer, "template_options", {})
    usual = tokenizer.apply_chat_template(
        list(chat), tokenize=True, return_dict=False, **options
    )
    same = ours.prompt + ours.completions[0] == usual
    if not same or usual[-1] == padding:
        raise InputError(
            f"{place} has different tokens in training and in apply_chat_template, so"
            " scores of the exported model would differ; change the chat template so"
            " that it renders answers unchanged"
        )


def _accepted(tokenizer: Any, place: str) -> tuple[Message, ...] | None:
    """The first of two short chats that the chat template renders, or None."""
    for chat in (CHAT, (SYSTEM, *CHAT)):
        try:
            render_template(chat, place, tokenizer, False)
        except InputError:
            continue
        return chat
    return None
