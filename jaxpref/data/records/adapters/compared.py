"""Two answers in fields of their own, and one field that says which is better.

PKU-SafeRLHF, WebGPT comparisons, SHP, HelpSteer2-Preference, and edits by users.
"""

from typing import Any

from jaxpref.data.records.adapters.adapter import (
    SAME_SCORE,
    Adapter,
    PairRules,
    Vote,
    by_votes,
    by_winner,
    choice,
    each_vote,
    has,
    listed,
    number,
    pair,
)
from jaxpref.data.records.checks import field, kind
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError


def _safe_rlhf(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The preference is in `better_response_id`: 0 or 1."""
    place = f"{where}: field 'better_response_id'"
    names = {0: "response_0", 1: "response_1"}
    winner = choice(field(record, "better_response_id", where), names, place)
    answers = {name: field(record, name, where) for name in names.values()}
    return [by_winner(("prompt", field(record, "prompt", where)), answers, winner)]


def _webgpt(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The scores, which sum to 0, are in `score_0` and `score_1`."""
    question = field(record, "question", where)
    if isinstance(question, dict):
        question = field(question, "full_text", f"{where}: field 'question'")
    scores = {f"answer_{n}": f"score_{n}" for n in (0, 1)}
    return _scored(record, where, ("question", question), scores)


def _scored(
    record: Record, where: str, prompt: tuple, scores_of: dict[str, str]
) -> list[Rewritten]:
    """The pair of two answers with a score each."""
    answers = {name: field(record, name, where) for name in scores_of}
    scores = {
        name: number(field(record, score, where), f"{where}: field '{score}'")
        for name, score in scores_of.items()
    }
    best, other = sorted(answers, key=lambda name: -scores[name])
    margin = scores[best] - scores[other]
    return [
        pair(
            prompt,
            (best, answers[best]),
            (other, answers[other]),
            reason="" if margin else SAME_SCORE,
            score_chosen=scores[best],
            score_rejected=scores[other],
            margin=margin,
        )
    ]


def _shp(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """`labels` is 1 if the first of two comments has more votes, and 0 otherwise."""
    names = {1: "human_ref_A", 0: "human_ref_B"}
    place = f"{where}: field 'labels'"
    winner = choice(field(record, "labels", where), names, place)
    answers = {name: field(record, name, where) for name in names.values()}
    return [by_winner(("history", field(record, "history", where)), answers, winner)]


OPINIONS = "all_preferences_unprocessed", "three_most_similar_preferences"
"""Fields of HelpSteer2-Preference with an object for each annotator's opinion."""


def _helpsteer(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """`preference_strength` is from -3, the first is much better, to 3, the second.

    It is the publisher's summary of the opinions of three to five annotators, who are
    not named.  If the record has these, each is a vote.  The majority is the
    publisher's, and `agreement` the share of the votes that agree with it.
    """
    names = "response_1", "response_2"
    answers = {name: field(record, name, where) for name in names}
    prompt = "prompt", field(record, "prompt", where)
    place = f"{where}: field 'preference_strength'"
    overall = _strength(field(record, "preference_strength", where), place)
    source = next((x for x in OPINIONS if record.peek(x)), None)
    votes = []
    place = f"{where}: field '{source}'"
    for n, one in enumerate(listed(record[source], place) if source else []):
        strength = one.get("strength") if isinstance(one, dict) else None
        votes.append(_strength(strength, f"{place} {n + 1} 'strength'"))
    preferred = lambda strength: names[strength > 0] if strength else None
    if votes and rules.votes == "each":
        opinions = [Vote(preferred(x), None, {"strength": abs(x)}) for x in votes]
        return by_votes(prompt, answers, opinions, rules)
    winner, shares = preferred(overall), {}
    if decisive := [x for x in votes if x]:
        agree = sum(preferred(x) == winner for x in decisive)
        shares = {"agreement": agree / len(decisive), "num_votes": len(decisive)}
    return [by_winner(prompt, answers, winner, strength=abs(overall), **shares)]


def _strength(value: Any, place: str) -> float:
    """A preference from -3 to 3."""
    found = number(value, place)
    if not -3 <= found <= 3:
        raise InputError(f"{place} must be from -3 to 3, but it is {found}; correct it")
    return found


def _helpsteer_rows(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    raise InputError(
        f"{where}: rows of HelpSteer2 hold one rated answer each, and two rows make a"
        " pair; use HelpSteer2-Preference, write both answers in one record, or train"
        " on single answers: --fields completion=response with --loss"
        " attribute_regression or sft"
    )


def _edits(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """What a user made of a draft is preferred to the draft."""
    for name in ("draft", "edited"):
        if not isinstance(value := field(record, name, where), str | list | dict):
            raise InputError(
                f"{where}: field '{name}' must be a string or messages, but it is"
                f" {kind(value)}"
            )
    sides = [(x, record[x]) for x in ("edited", "draft")]
    return [pair(("prompt", field(record, "prompt", where)), *sides)]


SAFE_RLHF = Adapter(
    "safe_rlhf", has("response_0", "response_1", "better_response_id"), _safe_rlhf
)
WEBGPT = Adapter(
    "webgpt", has("answer_0", "answer_1", "score_0", "score_1"), _webgpt
)  # fmt: skip
SHP = Adapter("shp", has("history", "human_ref_A", "human_ref_B"), _shp)
HELPSTEER = Adapter(
    "helpsteer2_preference",
    has("response_1", "response_2", "preference_strength"),
    _helpsteer,
    each_vote,
)
HELPSTEER_ROWS = Adapter(
    "helpsteer2", has("prompt", "response", "helpfulness"), _helpsteer_rows
)
EDITS = Adapter("edits", has("draft", "edited"), _edits)
