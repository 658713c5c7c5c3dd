"""Prompts with their answers, whose rewards are computed, and records with rewards."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.answers import has_answers, read_answers
from jaxpref.data.bad_rows import read_rows
from jaxpref.data.records import Example, parse, parse_prompt, text_of
from jaxpref.data.records.mapping import mapped
from jaxpref.data.sources import Source
from jaxpref.errors import InputError

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt and its answers."""

    example: Example
    """The prompt and the answers, as they are tokenized."""
    record: Mapping[str, Any]
    """The record in the file."""
    place: str
    """The file and its row, for messages."""
    is_list: bool = False
    """Whether the record has a list of answers."""
    as_user: bool = False
    """Whether a prompt that is a text is a user's turn if the model has a chat
    template."""

    @property
    def texts(self) -> list[str]:
        """The answers as text."""
        return self.example.texts

    @property
    def prompt(self) -> str:
        """The prompt as text; of messages, the last one."""
        prompt = self.example.prompt
        return prompt if isinstance(prompt, str) else text_of(prompt[-1])

    def field(self, name: str) -> Any:
        """A field of the record that was answered; None if it has none."""
        return self.record.get(name)


def read_answered(source: Source, options: data.RecordOptions) -> list[Answered]:
    """The answers of all records, and their prompts.

    A record has several answers, as `jaxpref sample --out NAME.jsonl` writes them (see
    `data.answers`); or it is a pair; or it has one answer.

    Args:
      source: the records, as in their file.
      options: names of fields, fields to ignore, and whether a record that cannot be
        read is left out, which the log says.

    Raises:
      InputError: if a record has no prompt or no answer, and is not to be left out.
    """
    read = lambda record, place: _read(record, place, options)
    return [one for _, one in read_rows(source, read, options.on_bad_row)]


def _read(record: Any, place: str, options: data.RecordOptions) -> Answered:
    if not isinstance(record, Mapping):
        raise InputError(f"{place}: a record must be a JSON object")
    ours = mapped(record, options.mapped, place)
    ours = {k: v for k, v in ours.items() if k not in options.ignore_fields}
    if has_answers(ours):
        return Answered(_of_list(ours, place), record, place, is_list=True)
    sides = 2 if ours.get("rejected") is not None else 1
    example = parse(ours, place, sides=sides, allow_own_prompts=True)
    if isinstance(example, str):
        raise InputError(
            f"{place}: cannot be scored: {example}; --on-bad-row skip leaves it out"
        )
    return Answered(example, record, place)


def _of_list(record: Mapping[str, Any], place: str) -> Example:
    answers = read_answers(record, place)
    if not answers.texts:
        raise InputError(f"{place}: has no answers")
    prompt = parse_prompt(answers.record, place)
    if prompt is None:
        raise InputError(f"{place}: has no prompt; add a field 'prompt'")
    texts = answers.texts
    if prompt.is_conversation:
        texts = tuple(map(assistant_turn, texts))
    # An answer that was cut has no stop token, which must not be scored.
    ended = () if answers.ended is None or all(answers.ended) else answers.ended
    return Example(prompt.prompt, texts, variables=prompt.variables, ended=ended)


def after(answered: Answered, text: str) -> Answered:
    """The same with what follows a text in each answer; empty where it is missing."""
    ends = [answer.partition(text)[2].strip() for answer in answered.texts]
    example = answered.example
    turns = map(assistant_turn, ends) if example.is_conversation else ends
    example = dataclasses.replace(example, completions=tuple(turns))
    return dataclasses.replace(answered, example=example)


def assistant_turn(answer: Any) -> Any:
    """The assistant's message of an answer, which may be a text."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, str):
        return {"role": "assistant", "content": answer}
    return answer


def with_rewards(
    answered: Answered,
    total: Float[np.ndarray, " K"],
    parts: Mapping[str, Float[np.ndarray, " K"]],
) -> dict[str, Any]:
    """The record with the rewards of its answers.

    `scores` of a list, `score` of a single answer, `chosen_score` and `rejected_score`
    of a pair.  `rewards` has the parts by name if there are several.

    Args:
      answered: the record.
      total: the reward of each answer.
      parts: the rewards that it is made of, by name.
    """
    record = dict(answered.record)
    record.pop("rewards", None)
    if answered.is_list:
        record |= {"scores": _numbers(total)}
    else:
        record = _with_numbers(record, total, "score")
    if len(parts) > 1:
        record["rewards"] = {name: _numbers(x) for name, x in parts.items()}
    return record


def with_uncertainty(
    record: dict[str, Any],
    std: Float[np.ndarray, " K"],
    margin_std: float,
    p_chosen: float,
) -> dict[str, Any]:
    """The record with what `jaxpref.rewards.uncertainty` says of its answers.

    `score_std` as the rewards are placed, and `margin_std` and `p_chosen` of a pair.
    """
    if "scores" in record:
        return record | {"score_std": _numbers(std)}
    record = _with_numbers(record, std, "score_std")
    if f"{SIDES[0]}_score_std" in record:
        numbers = _numbers(np.array([margin_std, p_chosen]))
        record |= dict(zip(("margin_std", "p_chosen"), numbers))
    return record


def _with_numbers(
    record: dict[str, Any], values: Float[np.ndarray, " K"], name: str
) -> dict[str, Any]:
    """The record of a pair, or of one answer, with a number for each of them."""
    numbers = _numbers(values)
    if len(numbers) == 1:
        return record | {name: numbers[0]}
    of_side = zip(SIDES, numbers, strict=True)
    return record | {f"{side}_{name}": x for side, x in of_side}


def _numbers(values: Float[np.ndarray, " K"]) -> list[float | None]:
    """The values as JSON has them; None for those that could not be computed."""
    return [x if math.isfinite(x) else None for x in values.tolist()]
