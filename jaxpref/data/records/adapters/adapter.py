"""What an adapter is, and how it writes pairs of choices, votes, ratings and ranks."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxpref.data.cells import from_cell
from jaxpref.data.columns import LARGEST
from jaxpref.data.records.best_pair import best_pair
from jaxpref.data.records.checks import field, kind
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

TIE = "a vote is a tie"
SAME_SCORE = "no two answers have different scores"
NO_VOTE = "nobody has voted"
SPLIT = "the votes have no majority"


@dataclasses.dataclass(frozen=True)
class PairRules:
    """Which pairs are made from a record that has more than one."""

    pairs: str = "best-random"
    """Of answers with scores: "best-worst", "best-random" or "all"; or "list" for one
    record with all of them, in `completions` and `scores`."""
    votes: str = "each"
    """Of votes: a pair for "each", or one for the "majority"."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A format whose records are rewritten in the names that `parse` reads."""

    name: str
    """What `--format` calls it."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a record has this format, well formed or not."""
    rewrite: Callable[[Record, str, PairRules], list[Rewritten]]
    """The records that a record stands for, at least one; raises InputError if it is
    malformed.  Fields that are not read keep their names in each of them."""
    several: Callable[[PairRules], bool] = lambda rules: False
    """Whether a record may stand for more than one, by these rules."""


def all_pairs(rules: PairRules) -> bool:
    """Whether a record of scored answers may stand for several."""
    return rules.pairs == "all"


def each_vote(rules: PairRules) -> bool:
    """Whether a record of votes may stand for several."""
    return rules.votes == "each"


class Vote(NamedTuple):
    """One opinion about two answers."""

    winner: str | None
    """The name of the better answer; None for a tie."""
    annotator: Any = None
    """The annotator."""
    numbers: Mapping[str, Any] = {}
    """Further fields of its pair, such as a strength."""


def has(*names: str, but: Sequence[str] = ()) -> Callable[[Mapping], bool]:
    """Matches records that have all of some fields, and none of others."""
    return lambda record: (
        all(x in record for x in names) and not any(x in record for x in but)
    )


def one_of(record: Mapping, names: Sequence[str], where: str) -> tuple[str, Any]:
    """The first of these fields that a record has, and its value."""
    name = next((x for x in names if x in record), names[0])
    return name, field(record, name, where)


def listed(value: Any, place: str) -> list[Any]:
    """A list; also one of objects that is stored by column, as Arrow does."""
    columns = isinstance(value, dict) and value.values()
    if columns and all(isinstance(x, list) for x in columns):
        return [dict(zip(value, row)) for row in zip(*columns)]
    if not isinstance(value, list):
        raise InputError(f"{place} must be a list, but it is {kind(value)}")
    return value


def number(value: Any, place: str) -> float:
    """A finite number, which may be the text of a cell."""
    value = from_cell(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{place} must be a number, but it is {kind(value)}")
    # Before any conversion to float: an integer may be too large.
    if not -LARGEST <= value <= LARGEST:
        raise InputError(f"{place} must be a finite number, but it is {value!r:.50}")
    return value


def choice(value: Any, choices: Mapping[Any, Any], place: str) -> Any:
    """What a value, or the number in the text of a cell, stands for.

    Raises:
      InputError: if it is none of the choices.
    """
    for meant in (value, from_cell(value)):
        if isinstance(meant, str | int | float) and meant in choices:
            return choices[meant]
    expected = ", ".join(repr(x) if isinstance(x, str) else str(x) for x in choices)
    raise InputError(
        f"{place} must be one of {expected}, but it is {value!r:.50}; correct it or"
        " remove the row"
    )


def pair(
    prompt: tuple[str, Any],
    chosen: tuple[str, Any],
    rejected: tuple[str, Any],
    *,
    reason: str = "",
    part: str = "",
    **others: Any,
) -> Rewritten:
    """A pair; prompt and answers are each the field's name in the file and its value.

    Args:
      prompt: the prompt.
      chosen: the better answer.
      rejected: the other one.
      reason: why the pair cannot be used; empty if it can.
      part: which part of the record it is.
      others: further fields; those that are None are left out.
    """
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    fields = {side: value for side, (_, value) in sides.items()}
    fields |= {name: value for name, value in others.items() if value is not None}
    names = {side: name for side, (name, _) in sides.items()}
    return Rewritten(fields, names, reason=reason, part=part)


def by_winner(
    prompt: tuple[str, Any],
    answers: Mapping[str, Any],
    winner: str | None,
    *,
    reason: str = TIE,
    part: str = "",
    **others: Any,
) -> Rewritten:
    """The pair of two answers by name; without a winner, one that is dropped."""
    first, second = answers
    best = winner if winner is not None else first
    other = second if best == first else first
    return pair(
        prompt,
        (best, answers[best]),
        (other, answers[other]),
        reason="" if winner is not None else reason,
        part=part,
        **others,
    )


def by_votes(
    prompt: tuple[str, Any],
    answers: Mapping[str, Any],
    votes: Sequence[Vote],
    rules: PairRules,
    **others: Any,
) -> list[Rewritten]:
    """A pair per vote with its annotator, or one pair for the majority.

    Ties do not count for the majority.  Its pair has the share of the votes that agree
    in `agreement`, that of the others in `flip_rate`, and their number in `num_votes`.
    """
    if not votes:
        return [by_winner(prompt, answers, None, reason=NO_VOTE, **others)]
    if rules.votes == "each":
        parts = [f"vote {n + 1}" if len(votes) > 1 else "" for n in range(len(votes))]
        return [
            by_winner(
                prompt,
                answers,
                vote.winner,
                part=part,
                annotator=vote.annotator,
                **others,
                **vote.numbers,
            )
            for vote, part in zip(votes, parts)
        ]
    counts = {name: sum(vote.winner == name for vote in votes) for name in answers}
    decisive, most = sum(counts.values()), max(counts.values())
    if not decisive or 2 * most == decisive:
        reason = SPLIT if decisive else TIE
        return [by_winner(prompt, answers, None, reason=reason, **others)]
    winner = max(counts, key=lambda name: counts[name])
    share = most / decisive
    return [
        by_winner(
            prompt,
            answers,
            winner,
            agreement=share,
            flip_rate=1 - share,
            num_votes=decisive,
            **others,
        )
    ]


def by_scores(
    prompt: tuple[str, Any],
    answers: Sequence[tuple[str, Any]],
    scores: Sequence[float],
    rules: PairRules,
    *,
    names: tuple[str, str] = ("score_chosen", "score_rejected"),
    part: str = "",
    **others: Any,
) -> list[Rewritten]:
    """Pairs of answers whose scores differ.

    "all" is every pair; for the other rules, see `best_pair`.  Which answer is drawn
    depends on the content of the record.

    Args:
      prompt: the field's name in the file, and its value.
      answers: at least two, the same way.
      scores: the score of each; higher is better.
      rules: which pairs are made.
      names: fields for the scores of both answers; `margin` is their difference.
      part: which part of the record it is.
      others: further fields of every pair.
    """
    if rules.pairs == "list":
        lists = {"completions": [x for _, x in answers], "scores": [*scores]}
        return [Rewritten({"prompt": prompt[1], **lists, **others}, part=part)]
    order = sorted(range(len(answers)), key=lambda n: -scores[n])
    key = json.dumps([prompt[1], [x for _, x in answers]], default=str)
    one = best_pair(scores, rules.pairs, key=key)
    if one is None:
        two = [answers[n] for n in order[:2]]
        return [pair(prompt, *two, reason=SAME_SCORE, part=part, **others)]
    found = [*itertools.combinations(order, 2)] if rules.pairs == "all" else [one]
    many = len(found) > 1
    return [
        pair(
            prompt,
            answers[a],
            answers[b],
            reason="" if scores[a] > scores[b] else SAME_SCORE,
            part=" ".join([part, f"pair {k + 1}"] if many else [part]).strip(),
            margin=scores[a] - scores[b],
            **{names[0]: scores[a], names[1]: scores[b]},
            **others,
        )
        for k, (a, b) in enumerate(found)
    ]


def user(text: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text}
