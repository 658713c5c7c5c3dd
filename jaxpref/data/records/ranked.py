"""Ranked answers: `prompt`, `completions`, and their `ranking`, where 1 is the best."""

import dataclasses
from collections.abc import Mapping

from jaxpref.data.records.answer_objects import ended_of_answers, texts_of_answers
from jaxpref.data.records.checks import field, kind, read_ended, text_or_messages
from jaxpref.data.records.example import TIED, Example
from jaxpref.data.records.messages import example_of
from jaxpref.errors import InputError


def matches(record: Mapping, sides: int) -> bool:
    """Whether there is a ranking."""
    return "ranking" in record


def parse(
    record: Mapping, where: str, *, sides: int, drop_empty: bool
) -> Example | str:
    """Returns the example with the best answer first; see `Format.parse`."""
    answers, ranks = (field(record, x, where) for x in ("completions", "ranking"))
    for name, value in (("completions", answers), ("ranking", ranks)):
        if not isinstance(value, list):
            raise InputError(
                f"{where}: field '{name}' must be a list, but it is {kind(value)}"
            )
    if len(answers) != len(ranks):
        raise InputError(
            f"{where}: {len(answers)} 'completions', but {len(ranks)} numbers in"
            " 'ranking'; give one for each"
        )
    if not all(type(rank) is int for rank in ranks):
        raise InputError(
            f"{where}: field 'ranking' must hold whole numbers, where 1 is best"
        )
    if sides > 1 and len(answers) != sides:
        raise InputError(
            f"{where}: {len(answers)} ranked 'completions' instead of {sides}; write"
            " one record for each pair to compare"
        )
    order = sorted(range(len(ranks)), key=lambda n: ranks[n])[:sides]
    if len({ranks[n] for n in order}) < len(order):
        return TIED
    texts = texts_of_answers(answers, f"{where}: field 'completions'")
    named = {f"completions {n + 1}": texts[n] for n in order}
    values = [text_or_messages(named, name, where) for name in named]
    prompt = text_or_messages(record, "prompt", where)
    example = example_of(prompt, [*named], values, where, drop_empty=drop_empty)
    ended = read_ended(record, where, len(answers)) or ended_of_answers(answers) or ()
    ended = () if all(ended) else ended
    if isinstance(example, str) or not ended:
        return example
    return dataclasses.replace(example, ended=tuple(ended[n] for n in order))
