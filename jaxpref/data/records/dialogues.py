r"""Whole dialogues: `\n\nHuman: ...\n\nAssistant: ...`, as in Anthropic's HH-RLHF.

`chosen` and `rejected` share all but the last turn, which is the completion.  A
`prompt` beside them must be part of what they share, and is not used.
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
    """Whether a side is a dialogue; with a prompt, whether that is beyond doubt.

    An answer to "Write a dialogue." may be one too, but does not begin with a blank
    line.
    """
    values: list[Any] = [record.get(name) for name in completion_fields(record, sides)]
    if "prompt" not in record:
        return any(_begins(value) for value in values)
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        return False
    dialogues = [x for x in values if _begins(x) and ASSISTANT_TURN in x]
    repeated = [prompt.strip() in _split_at_last(x)[0] for x in dialogues]
    if len(dialogues) == len(values) and any(repeated):
        return True
    return any(x.startswith("\n\n" + HUMAN_TURN) for x in dialogues)


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`.

    An empty completion is always dropped, since published datasets contain some.
    """
    names = completion_fields(record, sides)
    texts = [text(record, name, where) for name in names]
    for name, x in zip(names, texts):
        if not (_begins(x) and ASSISTANT_TURN in x):
            raise not_a_dialogue(record, name, where)
    splits = [_split_at_last(x) for x in texts]
    if any("\n\n" + HUMAN_TURN in completion for _, completion in splits):
        return HUMAN_LAST
    prompt = text(record, "prompt", where).strip() if "prompt" in record else ""
    if not any(prompt in shared for shared, _ in splits):
        raise InputError(
            f"{where}: field 'prompt' is not part of the dialogues in"
            f" {' and '.join(map(repr, names))}, which have prompts of their own;"
            " remove it, or write it at their beginning"
        )
    return to_example(names, splits, where, drop_empty=True)


def not_a_dialogue(record: Mapping, name: str, where: str) -> InputError:
    """The error for a record that needs a dialogue in a field and has none."""
    form = "'\\n\\nHuman: ...\\n\\nAssistant: ...'"
    if "prompt" in record:
        return InputError(
            f"{where}: field '{name}' is not a dialogue of {form}, but the other answer"
            " is; write both as dialogues, or both as answers to 'prompt'"
        )
    return InputError(
        f"{where}: no field 'prompt', and field '{name}' is not a dialogue of {form};"
        " add a prompt, or name its field with --fields prompt=NAME"
    )


def _begins(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(HUMAN_TURN)


def _split_at_last(text: str) -> tuple[str, str]:
    """Splits at the last assistant turn; earlier answers belong to the prompt."""
    before, turn, completion = text.rpartition(ASSISTANT_TURN)
    return before + turn, completion
