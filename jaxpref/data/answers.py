"""Several answers to a prompt, with what is known of them: logs of samplers, scores.

A record has them in `completions`: texts, messages, or objects with a `text` each, as
`jaxpref sample --out NAME.jsonl` writes them; or in `outputs`, as vLLM's
`RequestOutput` has them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.records.answer_objects import ended_of_answers, texts_of_answers
from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class Answers:
    """A prompt's record without its answers, and the answers."""

    record: dict[str, Any]
    texts: tuple[Any, ...]
    """Each a text, or messages."""
    scores: tuple[float | None, ...] | None = None
    """Larger is better; None if there are none, or for an answer without one."""
    ended: tuple[bool, ...] | None = None
    """Whether each answer is complete; None if unknown."""
    stds: tuple[float | None, ...] | None = None
    """Standard deviations of the scores, from `jaxpref score --uncertainty`."""

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, numbers: Sequence[int]) -> "Answers":
        """Some of the answers."""
        of_kept = lambda values: values and tuple(values[n] for n in numbers)
        return dataclasses.replace(
            self,
            texts=tuple(self.texts[n] for n in numbers),
            scores=of_kept(self.scores),
            ended=of_kept(self.ended),
            stds=of_kept(self.stds),
        )


LISTS = ("completions", "outputs", "scores", "score_std", "ended", "ranks", "ranking")
"""Fields with a value for each answer."""


def has_answers(record: Mapping[str, Any]) -> bool:
    """Whether a record has a list of answers; see the module's docstring."""
    return bool(_field(record))


def given_answers(record: Mapping[str, Any]) -> list[Any]:
    """The list of a record that has one, as it is in the file."""
    return record[_field(record)]


def read_answers(record: Any, where: str) -> Answers:
    """The answers of a record; see the module's docstring.

    Raises:
      InputError: if there are none, or a score is not a finite number.
    """
    if not isinstance(record, Mapping) or not has_answers(record):
        raise InputError(
            f"{where}: has no answers; give 'completions', such as `jaxpref sample "
            "--out NAME.jsonl` writes"
        )
    field, given = _field(record), given_answers(record)
    texts = texts_of_answers(given, f"{where}: field '{field}'")
    _check_lengths(record, len(texts), where)
    ended = record.get("ended") or ended_of_answers(given)
    scores, stds = record.get("scores"), record.get("score_std")
    return Answers(
        {name: value for name, value in record.items() if name not in LISTS},
        tuple(texts),
        None if scores is None else tuple(_score(x, where) for x in scores),
        None if ended is None else tuple(ended),
        None if stds is None else tuple(_score(x, where) for x in stds),
    )


def _field(record: Mapping[str, Any]) -> str:
    """The field with the list of answers; empty if there is none."""
    if isinstance(record.get("completions"), list):
        return "completions"
    outputs = record.get("outputs")
    of_vllm = isinstance(outputs, list) and all(
        isinstance(x, Mapping) and "text" in x for x in outputs
    )
    return "outputs" if of_vllm else ""


def _check_lengths(record: Mapping[str, Any], count: int, where: str) -> None:
    for name in ("scores", "ended", "score_std"):
        values = record.get(name)
        if values is not None and (
            not isinstance(values, list) or len(values) != count
        ):
            raise InputError(
                f"{where}: field '{name}' must be a list with a value for each of the"
                f" {count} answers"
            )


def _score(value: Any, where: str) -> float | None:
    """A score; None for an answer that `jaxpref score` could not score."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise InputError(
            f"{where}: a score must be a finite number, but it is {value!r:.50}"
        )
    return float(value)
