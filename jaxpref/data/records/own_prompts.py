"""Answers to prompts of their own, in `chosen_prompt` and `rejected_prompt`.

Prompts and answers are texts or messages, as in the other formats.  A run that reads
single answers reads the chosen one.
"""

from collections.abc import Mapping

from jaxpref.data.records.checks import completion_fields, joined, text_or_messages
from jaxpref.data.records.example import Example
from jaxpref.data.records.messages import example_of
from jaxpref.errors import InputError

PROMPTS = {"chosen": "chosen_prompt", "rejected": "rejected_prompt"}
"""The field of the prompt of each answer."""


def matches(record: Mapping, sides: int | None) -> bool:
    """Whether an answer has a prompt of its own."""
    return sides is not None and has_own_prompts(record)


def has_own_prompts(record: Mapping) -> bool:
    """Whether a record has one of the fields of this format."""
    return any(name in record for name in PROMPTS.values())


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example; see `Format.parse`."""
    if record.get("prompt") is not None:
        raise InputError(
            f"{where}: both 'prompt' and 'chosen_prompt' or 'rejected_prompt'; remove"
            " one of them, or pass --ignore-fields prompt"
        )
    answers = []
    for name in completion_fields(record, 2)[:sides]:
        prompt = text_or_messages(record, PROMPTS[name], where)
        value = text_or_messages(record, name, where)
        if prompt == []:
            raise InputError(f"{where}: field '{PROMPTS[name]}' has no messages")
        answer = example_of(prompt, [name], [value], where, drop_empty=drop_empty)
        if isinstance(answer, str):
            return answer
        answers.append((answer.prompt, answer.completions[0]))
    return joined(answers, where)
