"""Answers with ratings: UltraFeedback's `completions`, distilabel's `generations`.

`--pairs` says which pairs are made.  The score of an UltraFeedback completion is its
`overall_score`, or else its `fine-grained_score`, or else the mean of its ratings.
"""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.adapters.adapter import (
    Adapter,
    PairRules,
    all_pairs,
    by_scores,
    has,
    listed,
    number,
    one_of,
)
from jaxpref.data.records.checks import field, kind
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

SCORES = "overall_score", "fine-grained_score"


def _ultrafeedback(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    place = f"{where}: field 'completions'"
    completions = listed(field(record, "completions", where), place)
    answers, scores = [], []
    for n, one in enumerate(completions):
        if not isinstance(one, dict) or "response" not in one:
            raise InputError(
                f"{place} {n + 1} must be an object with a 'response', but it is"
                f" {kind(one)}"
            )
        score = _score(one, f"{place} {n + 1}")
        if score is not None:
            answers.append((f"completions {n + 1}", one["response"]))
            scores.append(score)
    prompt = "instruction", field(record, "instruction", where)
    return _pairs(prompt, answers, scores, rules, place)


def _score(completion: Mapping[str, Any], place: str) -> float | None:
    """The score; None if the completion has not been rated."""
    for name in SCORES:
        if completion.get(name) is not None:
            return number(completion[name], f"{place} '{name}'")
    rated = completion.get("annotations")
    if not isinstance(rated, dict) or not rated:
        raise InputError(
            f"{place} has no '{SCORES[0]}', '{SCORES[1]}' or 'annotations'; add a score"
        )
    ratings = [_rating(x, f"{place} 'annotations.{name}'") for name, x in rated.items()]
    known = [x for x in ratings if x is not None]
    return sum(known) / len(known) if known else None


def _rating(annotation: Any, place: str) -> float | None:
    """The rating of one aspect, which is text in the file; None for "N/A"."""
    value = annotation.get("Rating") if isinstance(annotation, dict) else annotation
    if value in (None, "N/A"):
        return None
    try:
        return number(float(value), place)
    except (TypeError, ValueError):
        raise InputError(
            f"{place} must have a number as 'Rating', but it is {value!r:.50}"
        ) from None


def _generations(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    prompt = one_of(record, ("instruction", "prompt", "input"), where)
    place, rated = f"{where}: field 'generations'", one_of(
        record, ("ratings", "rating"), where
    )  # fmt: skip
    generations = listed(field(record, "generations", where), place)
    ratings = listed(rated[1], f"{where}: field '{rated[0]}'")
    if len(generations) != len(ratings):
        raise InputError(
            f"{place} has {len(generations)} answers, but '{rated[0]}' has"
            f" {len(ratings)} numbers; give one for each"
        )
    answers, scores = [], []
    for n, (answer, score) in enumerate(zip(generations, ratings)):
        if answer is not None and score is not None:
            answers.append((f"generations {n + 1}", answer))
            scores.append(number(score, f"{where}: field '{rated[0]}' {n + 1}"))
    return _pairs(prompt, answers, scores, rules, place)


def _pairs(
    prompt: tuple[str, Any],
    answers: list[tuple[str, Any]],
    scores: list[float],
    rules: PairRules,
    place: str,
) -> list[Rewritten]:
    if len(answers) < 2:
        raise InputError(
            f"{place} has {len(answers)} answers with a score; a pair needs two, so"
            " remove the row"
        )
    return by_scores(prompt, answers, scores, rules)


ULTRAFEEDBACK = Adapter(
    "ultrafeedback",
    has("instruction", "completions", but=("chosen", "ranking")),
    _ultrafeedback,
    several=all_pairs,
)
GENERATIONS = Adapter(
    "generations",
    lambda record: (
        has("generations", but=("chosen",))(record)
        and bool({"ratings", "rating"} & record.keys())
    ),
    _generations,
    several=all_pairs,
)
