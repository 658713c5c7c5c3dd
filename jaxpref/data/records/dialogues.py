r"""Whole dialogues: `\n\nHuman: ...\n\nAssistant: ...`, as in Anthropic's HH-RLHF.

`chosen` and `rejected` share all but the last turn, which is the completion.  A
`prompt` that the dialogues repeat is ignored.
"""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.checks import (
    completion_fields,
    text,
    to_example,
)
from jaxpref.data.records.example import HUMAN_LAST, Example
from jaxpref.errors import InputError

HUMAN_TURN = "Human:"
ASSISTANT_TURN = "\n\nAssistant:"


def matches(record: Mapping, sides: int) -> bool:
    """Whether a side is a dialogue; with a prompt, whether all sides repeat it."""
    values: list[Any] = [record.get(name) for name in completion_fields(record, sides)]
    if "prompt" not in record:
        return any(_begins(value) for value in values)
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not all(_begins(value) for value in values):
        return False
    parts = [value.rpartition(ASSISTANT_TURN) for value in values]
    answered = all(turn for _, turn, _ in parts)
    return answered and any(prompt.strip() in x + turn for x, turn, _ in parts)


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`.

    An empty completion is always dropped, since published datasets contain some.
    """
    names = completion_fields(record, sides)
    texts = [text(record, name, where) for name in names]
    splits = [_split(name, x, where) for name, x in zip(names, texts)]
    if any("\n\n" + HUMAN_TURN in completion for _, completion in splits):
        return HUMAN_LAST
    return to_example(names, splits, where, drop_empty=True)


def not_a_dialogue(name: str, where: str) -> InputError:
    """The error for a record without a prompt whose field is not a dialogue."""
    return InputError(
        f"{where}: no field 'prompt', and field '{name}' is not a dialogue of"
        " '\\n\\nHuman: ...\\n\\nAssistant: ...'; add a prompt"
    )


def _begins(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(HUMAN_TURN)


def _split(name: str, text: str, where: str) -> tuple[str, str]:
    """Splits at the last assistant turn; earlier answers belong to the prompt."""
    before, turn, completion = text.rpartition(ASSISTANT_TURN)
    if not turn or not _begins(before):
        raise not_a_dialogue(name, where)
    return before + turn, completion
