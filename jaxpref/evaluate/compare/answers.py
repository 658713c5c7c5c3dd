"""Answers of models to the same prompts, in the formats of AlpacaEval and others."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref.data import open_source
from jaxpref.data.answers import given_answers, has_answers
from jaxpref.data.answers import read_answers as answers_of_record
from jaxpref.data.records import Message, parse_prompt, prompt_key
from jaxpref.data.records.mapping import value_at
from jaxpref.data.sources import Source
from jaxpref.errors import InputError

Prompt = str | tuple[Message, ...]


class Key(NamedTuple):
    """What the answers of several models are matched by."""

    prompt: str
    number: int
    """Which of the answers to this prompt, from 0."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    text: str
    prompt: Prompt | None
    """None in files that name the question without its text."""
    place: str
    """The file and its row, for messages."""
    logp: float | None = None
    """Its log-probability under the model, in nats."""
    reference_logp: float | None = None
    """Its log-probability under the model before training, in nats."""
    ended: bool = True
    """Whether it is complete."""
    difficulty: float | None = None
    """AlpacaEval's difficulty of the instruction."""
    as_user: bool = True
    """Whether a prompt that is a text is a user's turn if the model has a chat
    template; `jaxpref sample --out NAME.jsonl` writes turns as messages."""


@dataclasses.dataclass(frozen=True)
class ModelAnswers:
    """The answers of a model."""

    name: str
    path: str
    answers: Mapping[Key, Answer]


def read_models(paths: Sequence[str]) -> list[ModelAnswers]:
    """The answers in each file.

    Each record is one of AlpacaEval's (`instruction`, `output`, `generator`), of
    Arena-Hard's (`messages` and `model`, or `choices`, `question_id` and `model_id`),
    or a line of `jaxpref sample --out NAME.jsonl`.  Models with the same name are
    called by their files.

    Raises:
      InputError: if a record is none of these, or a file has none.
    """
    found = [_read_model(path) for path in paths]
    counts = collections.Counter(one.name for one in found)
    return [
        dataclasses.replace(one, name=one.path) if counts[one.name] > 1 else one
        for one in found
    ]


def after(model: ModelAnswers, text: str | None) -> ModelAnswers:
    """The model with what follows a text in each answer; empty where it is missing.

    With None, the model as it is.

    Raises:
      InputError: if no answer has the text.
    """
    if text is None:
        return model
    if not any(text in one.text for one in model.answers.values()):
        raise InputError(
            f"{model.path}: no answer contains --answer-after {text!r}, so that all "
            "would be empty; leave the option out, and remove the reasoning from the "
            "other files"
        )
    end = lambda one: one.text.partition(text)[2].strip()
    answers = {
        key: dataclasses.replace(one, text=end(one))
        for key, one in model.answers.items()
    }
    return dataclasses.replace(model, answers=answers)


def shared_keys(models: Sequence[ModelAnswers]) -> list[Key]:
    """The answers that all models have, in the order of the first file.

    Raises:
      InputError: if there are none.
    """
    first, *others = models
    keys = [x for x in first.answers if all(x in other.answers for other in others)]
    if not keys:
        names = " and ".join(one.path for one in models)
        raise InputError(
            f"{names}: share no prompt; sample all models from the same prompts"
        )
    return keys


def _read_model(path: str) -> ModelAnswers:
    source = open_source(path)
    names: list[str] = []
    answers: dict[Key, Answer] = {}
    counts: collections.Counter[str] = collections.Counter()
    for prompt, answer, name in _read(source):
        answers[Key(prompt, counts[prompt])] = answer
        counts[prompt] += 1
        names.append(name)
    if not answers:
        raise InputError(f"{path}: contains no answers")
    others = [(n, x) for n, x in enumerate(names) if x != names[0]]
    if others:
        place = [*answers.values()][others[0][0]].place
        raise InputError(
            f"{place}: is an answer of {others[0][1]!r:.80}, but the file begins with "
            f"{names[0]!r:.80}; write a file for each model"
        )
    return ModelAnswers(names[0] or Path(path).stem, path, answers)


def _read(source: Source) -> Iterator[tuple[str, Answer, str]]:
    """The key of its prompt, each answer, and the name of its model."""
    for row in range(len(source)):
        record, place = source[row], source.location(row)
        if not isinstance(record, Mapping):
            raise InputError(f"{place}: a record must be a JSON object")
        if has_answers(record):
            yield from _sampled(record, place)
        elif {"instruction", "output"} <= record.keys():
            yield _alpaca_eval(record, place)
        elif "choices" in record or isinstance(record.get("messages"), list):
            yield _arena_hard(record, place)
        else:
            raise InputError(
                f"{place}: has no answer; give 'instruction' and 'output' (AlpacaEval),"
                " 'messages' and 'model' (Arena-Hard), or a file of `jaxpref sample`; "
                f"the record has {', '.join(map(str, record))[:200]}"
            )


def _alpaca_eval(record: Mapping[str, Any], place: str) -> tuple[str, Answer, str]:
    prompt, text = (_text(record, x, place) for x in ("instruction", "output"))
    answer = Answer(
        text,
        prompt,
        place,
        _number(record, "logp", place),
        _number(record, "reference_logp", place),
        record.get("ended") is not False,
        _number(record, "instruction_difficulty", place),
    )
    return prompt_key(prompt), answer, str(record.get("generator") or "")


def _sampled(
    record: Mapping[str, Any], place: str
) -> Iterator[tuple[str, Answer, str]]:
    """All answers of a line of `jaxpref sample --out NAME.jsonl`."""
    found = answers_of_record(record, place)
    prompt = parse_prompt(found.record, place)
    if prompt is None:
        raise InputError(f"{place}: has no prompt; add a field 'prompt'")
    ended = found.ended or [True] * len(found)
    for one, text, is_whole in zip(given_answers(record), found.texts, ended):
        if not isinstance(text, str):
            raise InputError(f"{place}: field 'completions' must hold texts")
        about = one if isinstance(one, Mapping) else {}
        logps = (_number(about, x, place) for x in ("logp", "reference_logp"))
        answer = Answer(
            text, prompt.prompt, place, *logps, ended=is_whole, as_user=False
        )
        yield _key(prompt.prompt), answer, str(record.get("generator") or "")


def _arena_hard(record: Mapping[str, Any], place: str) -> tuple[str, Answer, str]:
    """A line of version 2, with all messages, or of version 0.1, with the answer."""
    if "choices" in record:
        text = value_at(record, "choices.0.turns.0.content", "answer", place)
        question = _text(record, "question_id", place)
        answer = Answer(_content(text, place), None, place)
        return question, answer, str(record.get("model_id") or "")
    turns = record["messages"]
    last = turns[-1] if len(turns) > 1 else None
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"{place}: field 'messages' must hold objects")
    if last is None or last.get("role") != "assistant":
        raise InputError(
            f"{place}: field 'messages' must end with the assistant's answer to a user"
        )
    prompt = tuple(turns[:-1])
    answer = Answer(_content(last.get("content"), place), prompt, place)
    key = str(record.get("uid") or _key(prompt))  # what its judgments name
    return key, answer, str(record.get("model") or "")


def _key(prompt: Prompt) -> str:
    """A user's single turn has the same key as its text."""
    if not isinstance(prompt, str) and len(prompt) == 1:
        return prompt_key(str(prompt[0].get("content", "")))
    return prompt_key(prompt)


def _content(value: Any, place: str) -> str:
    """The text of an answer, which Arena-Hard 2 writes as {"answer": text}."""
    if isinstance(value, Mapping):
        value = value.get("answer")
    if not isinstance(value, str):
        raise InputError(f"{place}: the assistant's answer must be a text")
    return value


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(
            f"{place}: field '{name}' must be a text, but it is {value!r:.50}"
        )
    return value


def _number(record: Mapping[str, Any], name: str, place: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{place}: field '{name}' must be a number, but it is {value!r:.50}"
        )
    return float(value)
