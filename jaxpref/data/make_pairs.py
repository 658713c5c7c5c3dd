"""Preference pairs from answers with scores, or from the answers of two models.

A record has its answers either in `completions`, with a number for each in `scores`, or
as `jaxpref sample --out NAME.jsonl` writes them, in `answers`, with the record of the
prompt in `record`.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpref.data.records.best_pair import Rule, best_pair
from jaxpref.data.records.example import prompt_key
from jaxpref.data.sources import Source
from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class Answers:
    """A prompt's record without its answers, and the answers."""

    record: dict[str, Any]
    texts: tuple[Any, ...]
    """Each a text, or messages."""
    scores: tuple[float | None, ...] | None
    """Larger is better; None if there are none, or for an answer without one."""
    ended: tuple[bool, ...] | None
    """Whether each answer is complete; None if unknown."""
    stds: tuple[float | None, ...] | None = None
    """Standard deviations of the scores, from `jaxpref score --uncertainty`."""


def read_answers(record: Any, where: str) -> Answers:
    """The answers of a record; see the module's docstring.

    Raises:
      InputError: if there are none, or a score is not a finite number.
    """
    if not isinstance(record, Mapping):
        record = {}
    if isinstance(texts := record.get("completions"), list):
        rest = {k: v for k, v in record.items() if k not in LISTS}
        found = {name: record.get(name) for name in ("scores", "ended", "score_std")}
    elif isinstance(answers := record.get("answers"), list):
        if not all(isinstance(x, Mapping) and "output" in x for x in answers):
            raise InputError(
                f"{where}: field 'answers' must hold objects with 'output'"
            )
        rest = record["record"] if isinstance(record.get("record"), dict) else record
        rest = {k: v for k, v in rest.items() if k != "answers"}
        texts = [x["output"] for x in answers]
        scores = [x.get("score") for x in answers]
        given = any(x is not None for x in scores)
        stds = [x.get("score_std") for x in answers]
        found = {
            "scores": scores if given else None,
            "ended": _all(answers, "ended"),
            "score_std": stds if any(x is not None for x in stds) else None,
        }
    else:
        raise InputError(
            f"{where}: has no answers; give 'completions' with 'scores', or a file of"
            " `jaxpref sample --out NAME.jsonl`"
        )
    for name, values in found.items():
        if values is not None and (
            not isinstance(values, list) or len(values) != len(texts)
        ):
            raise InputError(
                f"{where}: field '{name}' must be a list with a value for each of the"
                f" {len(texts)} answers"
            )
    scores, ended, stds = (found[name] for name in ("scores", "ended", "score_std"))
    return Answers(
        rest,
        tuple(texts),
        None if scores is None else tuple(_score(x, where) for x in scores),
        None if ended is None else tuple(ended),
        None if stds is None else tuple(_score(x, where) for x in stds),
    )


LISTS = ("completions", "scores", "score_std", "ended", "ranks", "ranking")
"""Fields with a value for each answer."""


def ranked_pairs(
    answers: Answers,
    where: str,
    *,
    rule: Rule,
    min_gap: float = 0.0,
    max_std: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Pairs of the answers of one record.

    Args:
      answers: with scores; answers without one are left out.
      where: "file row n", for errors.
      rule: which pairs; see `best_pair`.  Which answer "best-random" draws depends on
        the content of the record.
      min_gap: minimum difference of the scores, >= 0; equal scores never make a pair.
      max_std: answers whose score has a larger standard deviation are left out.

    Raises:
      InputError: if there are no scores, or no standard deviations for `max_std`.
    """
    if answers.scores is None:
        raise InputError(
            f"{where}: the answers have no scores; add 'scores', or pass --against"
        )
    if max_std is not None and answers.stds is None:
        raise InputError(
            f"{where}: the scores have no standard deviations 'score_std' for "
            "--max-std; score the answers with --uncertainty"
        )
    answers = _with_scores(answers, max_std)
    scores = [x for x in answers.scores or () if x is not None]
    if rule == "all":
        order = sorted(range(len(scores)), key=lambda n: -scores[n])
        far = lambda a, b: scores[a] - scores[b] >= min_gap and scores[a] > scores[b]
        pairs = [(a, b) for a, b in itertools.combinations(order, 2) if far(a, b)]
    else:
        one = best_pair(scores, rule, key=_text_key(answers), min_gap=min_gap)
        pairs = [] if one is None else [one]
    for a, b in pairs:
        gap = scores[a] - scores[b]
        numbers = {
            "chosen_score": scores[a],
            "rejected_score": scores[b],
            "margin": gap,
        }
        yield _pair(answers, a, answers, b) | numbers


def joined_pairs(
    better: Source, worse: Source, better_name: str, worse_name: str
) -> Iterator[dict[str, Any]]:
    """Pairs of the answers of two models to the same prompts, one by one.

    The n-th answer of the first is preferred to the n-th of the second (delta learning,
    Geng et al. 2025, arXiv:2507.06187).  Prompts in only one of the files, and equal
    answers, are left out.

    Raises:
      InputError: if a prompt occurs twice in `worse`, or the files share none.
    """
    others: dict[str, Answers] = {}
    for n in range(len(worse)):
        where = worse.location(n)
        found = read_answers(worse[n], where)
        key = _prompt(found, where)
        if key in others:
            raise InputError(
                f"{where}: its prompt occurs twice; keep one of the records"
            )
        others[key] = found
    shared = False
    for n in range(len(better)):
        where = better.location(n)
        found = read_answers(better[n], where)
        other = others.get(_prompt(found, where))
        if other is None:
            continue
        shared = True
        for k in range(min(len(found.texts), len(other.texts))):
            if found.texts[k] != other.texts[k]:
                yield _pair(found, k, other, k)
    if not shared:
        raise InputError(
            f"{better_name} and {worse_name}: no prompt is in both; sample both"
            " from the same prompts"
        )


def _with_scores(answers: Answers, max_std: float | None) -> Answers:
    """The answers that have a score, and one that is certain enough."""
    kept = [n for n, x in enumerate(answers.scores or ()) if x is not None]
    if max_std is not None and answers.stds is not None:
        stds = [math.inf if x is None else x for x in answers.stds]
        kept = [n for n in kept if stds[n] <= max_std]
    of_kept = lambda values: None if values is None else tuple(values[n] for n in kept)
    return dataclasses.replace(
        answers,
        texts=of_kept(answers.texts),
        scores=of_kept(answers.scores),
        ended=of_kept(answers.ended),
        stds=of_kept(answers.stds),
    )


def _pair(a: Answers, m: int, b: Answers, n: int) -> dict[str, Any]:
    pair = a.record | {"chosen": a.texts[m], "rejected": b.texts[n]}
    if a.ended is not None and b.ended is not None:
        pair["ended"] = [a.ended[m], b.ended[n]]
    return pair


def _prompt(answers: Answers, where: str) -> str:
    prompt = answers.record.get("prompt", answers.record.get("messages"))
    if not isinstance(prompt, str | list):
        raise InputError(
            f"{where}: no field 'prompt', by which the answers are matched; add one"
        )
    return prompt_key(prompt if isinstance(prompt, str) else tuple(prompt))


def _all(answers: list[Mapping], name: str) -> list[Any] | None:
    """A field of all answers; None if some lack it."""
    values = [x.get(name) for x in answers]
    return None if None in values else values


def _text_key(answers: Answers) -> str:
    return json.dumps([answers.record, answers.texts], sort_keys=True, default=str)


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
