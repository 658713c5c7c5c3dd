"""Completions with several assistant turns: `--train-turns all`.

The other formats read the last assistant turn of a conversation as its completion, and
everything before it as the prompt.  Here, the completion begins with the first turn
that is trained on:

    one answer        the first assistant turn after the record's own `prompt` and
                      after a user's turn
    several answers   the first message in which their conversations differ
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpref.data.records.checks import is_columns
from jaxpref.data.records.example import Example, Message
from jaxpref.data.records.sharegpt import ROLES


def with_all_turns(example: Example, given: Any) -> Example:
    """The example with the earlier assistant turns of its completions.

    Args:
      example: a record as its format reads it.
      given: the record's field `prompt`, or None; its turns are not trained on.

    Returns:
      The example with `turns`; unchanged if there are none, or if the conversations
      differ in a turn of someone else, since their prompts then differ.
    """
    if isinstance(example.prompt, str) or example.traces:
        return example
    wholes = [
        (*prompt, answer)
        for prompt, answer in zip(
            example.own_prompts or [example.prompt] * len(example.completions),
            example.completions,
            strict=True,
        )
        if not isinstance(prompt, str) and not isinstance(answer, str)
    ]
    if len(wholes) == 1:
        start = _first_trained(wholes[0], _count_answers(given))
    else:
        start = _first_different(wholes)
    following = [whole[start]["role"] for whole in wholes if start < len(whole)]
    if not start or following != ["assistant"] * len(wholes):
        return example
    turns = tuple(whole[start:-1] for whole in wholes)
    if not any(turns):
        return example
    return dataclasses.replace(
        example, prompt=wholes[0][:start], turns=turns, own_prompts=()
    )


def _first_trained(whole: Sequence[Message], given: int) -> int:
    """The number of messages before the first turn that is trained on."""
    roles = [message["role"] for message in whole]
    asked = roles.index("user") if "user" in roles else len(roles)
    skipped = max(given, roles[:asked].count("assistant"))
    answers = [n for n, role in enumerate(roles) if role == "assistant"]
    return answers[min(skipped, len(answers) - 1)]


def _first_different(wholes: Sequence[Sequence[Message]]) -> int:
    """The number of messages with which all conversations begin."""
    same = [all(x == column[0] for x in column) for column in zip(*wholes)]
    return (*same, False).index(False)


def _count_answers(prompt: Any) -> int:
    """The assistant's turns in a prompt, in any form that the formats read."""
    if is_columns(prompt):
        return prompt["role"].count("assistant")
    turns = prompt if isinstance(prompt, list) else []
    speakers = [turn.get("role", ROLES.get(turn.get("from"))) for turn in turns]
    return speakers.count("assistant")
