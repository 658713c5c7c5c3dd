"""Votes between two models: Chatbot Arena, MT-bench and MT-bench's human votes.

`conversation_a` and `conversation_b` with a `winner` and its `judge`; LMArena's
`response_a` and `winner_model_a`; or turns in `prompt`, `a` and `b` with `votes`.  The
conversations of a pair may have several rounds, with different answers before the last
one; such a pair does not share its prompt.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.adapters.adapter import (
    Adapter,
    PairRules,
    Vote,
    assistant,
    by_votes,
    by_winner,
    choice,
    each_vote,
    has,
    listed,
    user,
)
from jaxpref.data.records.checks import field, kind, text_or_messages
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

A, B = "conversation_a", "conversation_b"
NO_PROMPT = "prompt", []
"""Each conversation has the prompt itself."""


def winners(a: str, b: str) -> dict[str, str | None]:
    """What the winners in a file stand for; None for a tie."""
    ties = ("tie", "tie (bothbad)", "tie (both bad)", "both_bad", "bothbad")
    return {"model_a": a, "model_b": b, **dict.fromkeys(ties)}


def _arena(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """One vote; `turn` is the number of the round that it is about."""
    place = f"{where}: field 'winner'"
    winner = choice(field(record, "winner", where), winners(A, B), place)
    answers: dict[str, Any] = {}
    for name in (A, B):
        turns = text_or_messages(record, name, where)
        if isinstance(turns, str):
            raise InputError(f"{where}: field '{name}' must be messages, not a string")
        answers[name] = _until(turns, record.get("turn"))
    return [by_winner(NO_PROMPT, answers, winner, annotator=record.get("judge"))]


def _until(turns: list[dict], last: Any) -> list[dict]:
    """The turns up to the answer of a round, counted from 1."""
    if not isinstance(last, int) or isinstance(last, bool):
        return turns
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    return turns[: answers[last - 1] + 1] if 1 <= last <= len(answers) else turns


def _lmarena(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Rounds as JSON lists, and three fields of which one is 1."""
    sides = {"response_a": "model_a", "response_b": "model_b"}
    flags = {"model_a": "response_a", "model_b": "response_b", "tie": None}
    given = [
        answer
        for name, answer in flags.items()
        if choice(
            field(record, f"winner_{name}", where),
            {0: False, 1: True},
            f"{where}: field 'winner_{name}'",
        )
    ]
    if len(given) != 1:
        raise InputError(
            f"{where}: one of 'winner_model_a', 'winner_model_b' and 'winner_tie' must"
            f" be 1, but {len(given)} of them are; correct it or remove the row"
        )
    prompt = _texts(record, "prompt", where)
    answers = {name: _rounds(prompt, record, name, where) for name in sides}
    return [by_winner(NO_PROMPT, answers, given[0])]


def _mt_bench(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Several votes on the last round of two conversations."""
    prompt = _texts(record, "prompt", where)
    answers = {name: _rounds(prompt, record, name, where) for name in ("a", "b")}
    place = f"{where}: field 'votes'"
    votes = [
        Vote(
            choice(
                vote.get("winner") if isinstance(vote, dict) else vote,
                winners("a", "b") | {"a": "a", "b": "b"},
                f"{place} {n + 1} 'winner'",
            ),
            vote.get("judge") if isinstance(vote, dict) else None,
        )
        for n, vote in enumerate(listed(field(record, "votes", where), place))
    ]
    return by_votes(NO_PROMPT, answers, votes, rules)


def _rounds(prompt: list[str], record: Record, name: str, where: str) -> list[dict]:
    """The conversation of questions and the answers in a field."""
    answers = _texts(record, name, where)
    if len(answers) != len(prompt):
        raise InputError(
            f"{where}: field '{name}' has {len(answers)} answers to {len(prompt)}"
            " questions in 'prompt'; give one for each"
        )
    rounds = zip(prompt, answers)
    return [turn for q, answer in rounds for turn in (user(q), assistant(answer))]


def _texts(record: Record, name: str, where: str) -> list[str]:
    """The texts of a list, which may be stored as JSON; null is an empty text."""
    value = field(record, name, where)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    items = listed(value, f"{where}: field '{name}'")
    for n, item in enumerate(items):
        if not isinstance(item, str | None):
            raise InputError(
                f"{where}: field '{name}' {n + 1} must be a string, but it is"
                f" {kind(item)}"
            )
    return [item or "" for item in items]


def _mt_bench_matches(record: Mapping) -> bool:
    return has("prompt", "a", "b", "votes")(record)


ARENA = Adapter("arena", has(A, B, "winner"), _arena)
LMARENA = Adapter(
    "lmarena", has("prompt", "response_a", "response_b", "winner_model_a"), _lmarena
)
MT_BENCH = Adapter("mt_bench", _mt_bench_matches, _mt_bench, several=each_vote)
