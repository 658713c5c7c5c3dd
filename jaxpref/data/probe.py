"""Checks that an exported reward model gives the same scores in `transformers`."""

from pathlib import Path

from jaxpref.data.records import Example
from jaxpref.data.tokenize import load_tokenizer, tokenize
from jaxpref.errors import InputError

CHAT = (
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
)


def check_rendering(folder: Path) -> None:
    """Compares the tokens of a short chat with those of `apply_chat_template(chat)`.

    That is what `transformers` users score.  All tokens must be the same as in
    training, and the last one, where the score is read, must not be padding.

    Raises:
      InputError: if they differ.
    """
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        return
    place = f"{folder}: a short chat"
    example = Example(CHAT[:1], CHAT[1:])
    (ours,) = tokenize(
        [example], [place], tokenizer, max_length=1 << 20, whole_turns=True
    )
    if isinstance(ours, str):
        raise InputError(f"{place}: {ours}")
    usual = tokenizer.apply_chat_template(list(CHAT), tokenize=True, return_dict=False)
    same = ours.prompt + ours.completions[0] == usual
    if not same or usual[-1] == tokenizer.pad_token_id:
        raise InputError(
            f"{place} has different tokens in training and in apply_chat_template, so"
            " scores of the exported model would differ; change the chat template so"
            " that it renders answers unchanged"
        )
