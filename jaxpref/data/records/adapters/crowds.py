"""Several votes of named people on a pair: MultiPref, UKPConvArg; Community Alignment.

In Community Alignment, one person chooses the best of four answers in each round.
"""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.adapters.adapter import (
    NO_VOTE,
    Adapter,
    PairRules,
    Vote,
    assistant,
    by_scores,
    by_votes,
    choice,
    each_vote,
    has,
    listed,
    pair,
    user,
)
from jaxpref.data.records.checks import field, kind, text
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

WORKERS = "normal_worker_annotations", "expert_worker_annotations"
PREFERENCES = {
    "A-is-clearly-better": ("completion_a", 2),
    "A-is-slightly-better": ("completion_a", 1),
    "Tie": (None, 0),
    "B-is-slightly-better": ("completion_b", 1),
    "B-is-clearly-better": ("completion_b", 2),
}
"""The better answer, and how clear it is."""
TURNS = "first", "second", "third", "fourth", "fifth"
LETTERS = "a", "b", "c", "d"
_END = "<|end_of_text|>"


def _multipref(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """`overall_pref` of each annotation; `strength` is 1 (slightly) or 2 (clearly)."""
    votes = []
    for name in WORKERS:
        place = f"{where}: field '{name}'"
        for n, one in enumerate(listed(record.get(name) or [], place)):
            vote = _object(one, f"{place} {n + 1}")
            preferred, strength = choice(
                vote.get("overall_pref"), PREFERENCES, f"{place} {n + 1} 'overall_pref'"
            )
            fields = {"strength": strength} if strength else {}
            votes.append(Vote(preferred, vote.get("evaluator"), fields))
    answers = {x: field(record, x, where) for x in ("completion_a", "completion_b")}
    return by_votes(("text", field(record, "text", where)), answers, votes, rules)


def _ukp(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Which of the arguments `a1` and `a2` is more convincing."""
    place = f"{where}: field 'votes'"
    meaning = {"a1": "a1", "a2": "a2", "equal": None}
    votes = []
    for n, one in enumerate(listed(field(record, "votes", where), place)):
        vote = _object(one, f"{place} {n + 1}")
        winner = choice(vote.get("label"), meaning, f"{place} {n + 1} 'label'")
        votes.append(Vote(winner, vote.get("worker")))
    answers = {name: field(record, name, where) for name in ("a1", "a2")}
    title, stance = (text(record, x, where) for x in ("title", "stance"))
    return by_votes(("title", f"{title}\n{stance}\n\n"), answers, votes, rules)


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{place} must be an object, but it is {kind(value)}")
    return value


def _community(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The answer that was chosen in each round, against the three others."""
    turns, found = [], []
    for name in TURNS:
        asked, best = (
            record.get(f"{name}_turn_{x}") for x in ("prompt", "preferred_response")
        )
        if not asked:
            break
        fields = {f"response_{x}": f"{name}_turn_response_{x}" for x in LETTERS}
        answers = [(x, _answer(record, x, where)) for x in fields.values()]
        prompt = f"{name}_turn_prompt", [*turns, user(asked)]
        if not best:  # the conversation ends without a choice
            part = f"{name} turn"
            found.append(pair(prompt, *answers[:2], reason=NO_VOTE, part=part))
            break
        place = f"{where}: field '{name}_turn_preferred_response'"
        chosen = choice(best, fields, place)
        scores = [float(x == chosen) for x, _ in answers]
        annotator, part = record.get("annotator_id"), f"{name} turn"
        found += [
            _without_scores(x)
            for x in by_scores(
                prompt, answers, scores, rules, annotator=annotator, part=part
            )
            if not x.reason  # answers that were not chosen are not compared
        ]
        turns += [user(asked), assistant(dict(answers)[chosen])]
    if not found:
        raise InputError(f"{where}: field 'first_turn_prompt' is empty; remove the row")
    return found


def _without_scores(one: Rewritten) -> Rewritten:
    """The pair of a choice, which has no scores."""
    if "scores" in one.fields:  # a list
        return one
    left = {k: v for k, v in one.fields.items() if not k.startswith("score_")}
    left.pop("margin", None)
    return Rewritten(left, one.names, one.reason, one.part)


def _answer(record: Record, name: str, where: str) -> str:
    return text(record, name, where).removesuffix(_END)


MULTIPREF = Adapter(
    "multipref", has("completion_a", "completion_b", WORKERS[0]), _multipref, each_vote
)
UKP = Adapter("ukp", has("a1", "a2", "votes"), _ukp, several=each_vote)
COMMUNITY = Adapter(
    "community_alignment",
    has("first_turn_prompt", "first_turn_preferred_response"),
    _community,
    several=lambda rules: True,  # rounds of a conversation
)
