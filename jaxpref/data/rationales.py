"""Rationales: why the chosen answer is better, as a third completion of a record.

Its prompt continues that of the pair with both answers, and asks for the reason.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jaxpref.data.records import Example
from jaxpref.data.tokens import Tokens, shared_start
from jaxpref.errors import InputError

FIELD = "rationale"
WORSE = "\n\nA worse answer:\n"
WHY = "\n\nWhy the first answer is better:\n"
ASKED = "Here is a worse answer:\n{}\n\nWhy is your answer better?"


def question_of(example: Example, place: str) -> Example:
    """The rationale of a pair, as the answer to a question about both answers.

    In a conversation, the chosen answer is the assistant's turn, and the user shows the
    rejected one and asks why it is worse.

    Args:
      example: a pair, with the field `rationale` in `values`.
      place: "file row n", for errors.

    Raises:
      InputError: if the rationale is missing or not a text.
    """
    text = example.values.get(FIELD)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{place}: field '{FIELD}' must be a text that explains why 'chosen' is"
            " better; add it, or remove the row"
        )
    prompt, (chosen, rejected) = example.prompt, example.texts
    completion: str | dict[str, str]
    if isinstance(prompt, str):
        prompt, completion = f"{prompt}{chosen}{WORSE}{rejected}{WHY}", text
    else:
        asked = {"role": "user", "content": ASKED.format(rejected)}
        answer = {"role": "assistant", "content": chosen}
        prompt = (*prompt, answer, asked)
        completion = {"role": "assistant", "content": text}
    return Example(prompt, (completion,), variables=example.variables)


def with_rationales(
    examples: Sequence[Example],
    places: Sequence[str],
    tokenize: Callable[[Sequence[Example], Sequence[str]], list[Tokens | str]],
) -> list[Tokens | str]:
    """The tokens of pairs with their rationales as third completions.

    Args:
      examples: pairs with the field `rationale` in `values`.
      places: "file row n" of each, for errors.
      tokenize: `(examples, places) -> tokens`, or the reason to drop an example.

    Raises:
      InputError: as `question_of` and `tokenize`.
    """
    asked = [question_of(example, place) for example, place in zip(examples, places)]
    pairs, reasons = tokenize(examples, places), tokenize(asked, places)
    return [_joined(pair, reason) for pair, reason in zip(pairs, reasons, strict=True)]


def _joined(pair: Tokens | str, reason: Tokens | str) -> Tokens | str:
    if isinstance(pair, str):
        return pair
    if isinstance(reason, str):
        return f"rationale: {reason}"
    shared = shared_start([pair.prompt, reason.prompt])
    sides = pair.side_prompts or ([], [])
    return dataclasses.replace(
        pair,
        prompt=pair.prompt[:shared],
        side_prompts=(
            *(pair.prompt[shared:] + side for side in sides),
            reason.prompt[shared:],
        ),
        completions=[*pair.completions, *reason.completions],
        prompt_cut=pair.prompt_cut or reason.prompt_cut,
        completions_cut=pair.completions_cut + reason.completions_cut,
    )
