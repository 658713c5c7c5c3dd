"""Prompts with their answers, whose rewards are computed, and records with rewards."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.make_pairs import read_answers
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
    sampled: bool = False
    """Whether `jaxpref sample` wrote it, so that a prompt that is a text is a user's
    turn if the model has a chat template."""

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
        record = self.record
        if isinstance(inner := record.get("record"), Mapping) and self.sampled:
            record = inner
        return record.get(name)


def read_answered(source: Source, options: data.RecordOptions) -> list[Answered]:
    """The answers of all records, and their prompts.

    A record has a list in `completions` or, from `jaxpref sample --out NAME.jsonl`, in
    `answers`; or it is a pair; or it has one answer.

    Args:
      source: the records, as in their file.
      options: names of fields, and fields to ignore.

    Raises:
      InputError: if a record has no prompt or no answer.
    """
    return [
        _read(source[row], source.location(row), options) for row in range(len(source))
    ]


def _read(record: Any, place: str, options: data.RecordOptions) -> Answered:
    if not isinstance(record, Mapping):
        raise InputError(f"{place}: a record must be a JSON object")
    ours = mapped(record, options.mapped, place)
    ours = {k: v for k, v in ours.items() if k not in options.ignore_fields}
    sampled = isinstance(ours.get("answers"), list)
    if sampled or isinstance(ours.get("completions"), list):
        return Answered(_of_list(ours, place), record, place, sampled)
    sides = 2 if ours.get("rejected") is not None else 1
    example = parse(ours, place, sides=sides, allow_own_prompts=True)
    if isinstance(example, str):
        raise InputError(f"{place}: cannot be scored: {example}")
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
    return Example(prompt.prompt, texts, variables=prompt.variables)


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

    `scores` of a list, `score` of each of the `answers` and of a single answer,
    `chosen_score` and `rejected_score` of a pair.  `rewards` has the parts by name if
    there are several.

    Args:
      answered: the record.
      total: the reward of each answer.
      parts: the rewards that it is made of, by name.
    """
    record, scores = dict(answered.record), _numbers(total)
    if isinstance(answers := record.get("answers"), list):
        record["answers"] = [
            answer | {"score": score} for answer, score in zip(answers, scores)
        ]
    elif len(scores) == 1 and not isinstance(record.get("completions"), list):
        record["score"] = scores[0]
    elif record.get("rejected") is not None or "completions" not in record:
        record |= {f"{x}_score": y for x, y in zip(SIDES, scores, strict=True)}
    else:
        record["scores"] = scores
    if len(parts) > 1:
        record["rewards"] = {name: _numbers(x) for name, x in parts.items()}
    return record


def _numbers(values: Float[np.ndarray, " K"]) -> list[float | None]:
    """The values as JSON has them; None for those that could not be computed."""
    return [x if math.isfinite(x) else None for x in values.tolist()]
