"""Exports of Argilla and Label Studio.

Argilla: the texts are in `fields` (version 2, and `to_dict` of version 1) or beside the
questions (datasets on the Hub).  A label or ranking question names the better field,
such as "response_1"; a label may also be its last letter or number, as in "1" or "B" or
"Response B".  A rating of 1 or 2 counts only if its question asks for a choice, as
"choose-best" does.
Label Studio: the texts are in `data` (JSON) or beside the result (JSON_MIN), and each
annotation has a pairwise result, whose `selected` is "left" or "right".
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxpref.data.records.adapters.adapter import (
    Adapter,
    PairRules,
    Vote,
    by_votes,
    choice,
    each_vote,
    has,
    listed,
)
from jaxpref.data.records.checks import field, kind
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

PROMPTS = "prompt", "instruction", "question", "input", "context", "text"
"""Fields that hold a prompt, the first one that a record has."""
TIES = "tie", "ties", "equal", "both", "neither", "draw", "none"
_LAST = re.compile(r"(?:(?<=[a-zA-Z])\d+|(?<![^-_ ])(?:[a-zA-Z]|\d+))$")
"""The number or letter of a field, as in "response1", "response-1" or "answer_a"."""
SUBMITTED = None, "submitted"
"""The status of answers that count, unlike drafts and those that were discarded."""
_LABEL = re.compile(r"(?:(?P<noun>[a-z]+)[-_ ]?)??(?P<end>\d+|[a-z])", re.IGNORECASE)
"""A label that names a field by its end, such as "B", "Response B" or "answer_2"."""
NOUNS = (
    *("answer", "assistant", "candidate", "completion", "generation", "model"),
    *("option", "output", "reply", "response", "text"),
)
"""Words before that end; after other words, it is the end of a comment."""
_CHOICE = re.compile("best|better|choice|choose|compar|prefer|which|winner", re.I)
"""Names of questions whose numbers are answers, not ratings."""
Answer = tuple[Any, Any]
"""Answers to a question, each with the annotator."""


def _argilla(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    texts = record.get("fields")
    if not isinstance(texts, Mapping):
        texts = {name: record.peek(name) for name in record}
    answered = [(name, found) for name, found in _answered(record, where) if found]
    prompt = next((x for x in PROMPTS if isinstance(texts.get(x), str)), None)
    sides = _two_of(x for x in texts if x != prompt and isinstance(texts[x], str))
    if prompt is None or sides is None:
        raise InputError(
            f"{where}: an Argilla record must have a field 'prompt' and two answers,"
            " such as 'response_1' and 'response_2', but it has"
            f" {', '.join(map(str, texts))[:200]}; rename them in the export"
        )
    names = dict.fromkeys(name for name, _ in answered)
    by_question = {
        name: [one for x, found in answered if x == name for one in found]
        for name in names
    }
    question = _comparison(by_question, sides, where)
    votes = [
        Vote(_winner(_said(question, value), sides), None if who is None else str(who))
        for value, who in by_question.get(question or "", [])
    ]
    for name in (prompt, *sides):
        record.get(name)  # read, if the texts are beside the questions
    answers = {name: texts[name] for name in sides}
    return by_votes((prompt, texts[prompt]), answers, votes, rules)


def _comparison(
    questions: Mapping[str, list[Answer]], sides: tuple[str, str], where: str
) -> str | None:
    """The question that compares the answers; None if nobody answered any.

    Those that name the fields in full come before those that name their ends, which
    may be the answers to another question.

    Raises:
      InputError: if there is none, or more than one.
    """
    if not questions:
        return None
    for full in (True, False):
        found = [
            name
            for name, given in questions.items()
            if all(_winner(_said(name, x), sides, full) != "" for x, _ in given)
        ]
        if len(found) > 1:
            raise InputError(
                f"{where}: {len(found)} questions compare the answers:"
                f" {', '.join(found)[:200]}; export the record with one of them"
            )
        if found:
            return found[0]
    raise InputError(
        f"{where}: no question names '{sides[0]}' or '{sides[1]}' as the better answer;"
        f" there are answers to {', '.join(questions)[:200]}; label them with the names"
        " of the fields"
    )


def _two_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The two names that differ in their number or letter, or else the only two."""
    names = [*names]
    stems: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if found := _LAST.search(name):
            stems.setdefault(name[: found.start()], []).append((found[0], name))
    pairs = [sorted(ends) for ends in stems.values() if len(ends) == 2]
    if len(pairs) == 1:
        return pairs[0][0][1], pairs[0][1][1]
    return (names[0], names[1]) if len(names) == 2 else None


def _answered(record: Record, where: str) -> Iterator[tuple[str, list[Answer]]]:
    """The answers to each question, in the forms that Argilla's versions write."""
    responses = record.get("responses")
    if isinstance(responses, Mapping):  # version 2
        for name, answers in responses.items():
            place = f"{where}: field 'responses.{name}'"
            yield name, [*_submitted(listed(answers, place), place)]
    for n, one in enumerate(responses if isinstance(responses, list) else []):
        place = f"{where}: field 'responses' {n + 1}"
        if not isinstance(one, Mapping) or not isinstance(one.get("values"), Mapping):
            raise InputError(f"{place} must be an object with 'values'")
        if one.get("status", "submitted") == "submitted":  # version 1
            for name, value in one["values"].items():
                value = value.get("value") if isinstance(value, Mapping) else value
                yield name, [(value, one.get("user_id"))]
    for name in record:  # columns of a dataset on the Hub
        value = record.peek(name)
        if name.endswith(".responses") and isinstance(record[name], list):
            unknown = [None] * len(value)
            who = record.get(f"{name}.users") or unknown
            status = record.get(f"{name}.status") or unknown
            yield (
                name.removesuffix(".responses"),
                [
                    (answer, user)
                    for answer, user, state in zip(value, who, status)
                    if state in SUBMITTED
                ],
            )
        elif _is_question(value):
            place = f"{where}: field '{name}'"
            yield name, [*_submitted(listed(record[name], place), place)]


def _is_question(value: Any) -> bool:
    """Whether a column holds answers {user_id, value}, by row or by column."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and {"user_id", "value"} <= first.keys()


def _submitted(answers: list[Any], place: str) -> Iterator[Answer]:
    for n, one in enumerate(answers):
        if not isinstance(one, Mapping) or "value" not in one:
            raise InputError(f"{place} {n + 1} must be an object with 'value'")
        if one.get("status") in SUBMITTED:
            yield one["value"], one.get("user_id")


def _said(question: str | None, value: Any) -> Any:
    """The answer; a number is a text in a question that asks for a choice."""
    rating = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if rating and _CHOICE.search(question or "") else value


def _winner(value: Any, names: Sequence[str], full: bool = False) -> str | None:
    """The field that an answer names; None for a tie, "" if it names none.

    Args:
      value: the answer.
      names: the fields.
      full: whether only their full names count, not their ends.
    """
    if isinstance(value, list):  # a ranking: best first, or with a rank for each
        ranked = [
            (x.get("rank", n), x.get("value")) if isinstance(x, Mapping) else (n, x)
            for n, x in enumerate(value)
        ]
        ranks = {x: rank for rank, x in ranked if x in names}
        best = [x for x in ranks if ranks[x] == min(ranks.values())]
        if not best:
            return ""
        return best[0] if len(best) == 1 else None
    if not isinstance(value, str):  # a rating
        return ""
    answer = value.strip()
    if answer in names:
        return answer
    if answer.lower() in TIES:
        return None
    found = None if full else _LABEL.fullmatch(answer)
    if found is None:
        return ""
    ends = {x: end for x in names if (end := _LAST.search(x))}
    stems = {re.sub("[^a-z]", "", x[: end.start()].lower()) for x, end in ends.items()}
    if (found["noun"] or NOUNS[0]).lower() not in {*NOUNS, *stems}:
        return ""
    named = [x for x, end in ends.items() if end[0].lower() == found["end"].lower()]
    return named[0] if len(named) == 1 else ""


def _label_studio(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """A task of a JSON export, with the annotations of all annotators."""
    data = field(record, "data", where)
    if not isinstance(data, Mapping):
        raise InputError(
            f"{where}: field 'data' must be an object, but it is {kind(data)}"
        )
    prompt = next((x for x in PROMPTS if x in data), None)
    incomplete = InputError(
        f"{where}: field 'data' must have a prompt and two texts, whose names are"
        f" in 'to_name' of the result; it has {', '.join(map(str, data))[:200]}"
    )
    if prompt is None or len(data) < 3:
        raise incomplete
    votes = []
    place = f"{where}: field 'annotations'"
    for n, one in enumerate(listed(field(record, "annotations", where), place)):
        if not isinstance(one, Mapping):
            found = kind(one)
            raise InputError(f"{place} {n + 1} must be an object, but it is {found}")
        if one.get("was_cancelled"):
            continue
        for result in listed(one.get("result") or [], f"{place} {n + 1} 'result'"):
            if isinstance(result, Mapping) and result.get("type") == "pairwise":
                votes.append((result, n, one.get("completed_by")))
    given, answers = [], None
    for result, n, who in votes:
        shown = _shown(record, result, data, where)
        answers = answers or shown
        value = result.get("value")
        winner = _selected(value, tuple(shown), f"{place} {n + 1} 'selected'")
        given.append(Vote(winner, _named(who)))
    if answers is None:  # nobody has voted, so it does not matter which is left
        texts = _two_of(x for x in data if x != prompt and isinstance(data[x], str))
        answers = texts and {name: data[name] for name in texts}
    if answers is None:
        raise incomplete
    return by_votes((prompt, data[prompt]), answers, given, rules)


SHOWN = "left", "right"
"""Our names of the two texts, which `--fields` can give."""


def _shown(
    record: Record, result: Mapping, data: Mapping, where: str
) -> dict[str, Any]:
    """The left and the right text of a comparison, by name.

    A result names the tags of the labeling page.  Only if these are names of the data,
    too, does the export say which text is which.
    """
    if all(x in record for x in SHOWN):
        return {x: record[x] for x in SHOWN}
    named = [x.strip() for x in str(result.get("to_name", "")).split(",")]
    if len(named) == 2 and all(x in data for x in named):
        return {x: data[x] for x in named}
    raise InputError(
        f"{where}: the export does not say which text was on the left: the result"
        f" names '{result.get('to_name', '')!s:.100}', and 'data' has"
        f" {', '.join(map(str, data))[:200]}; pass --fields"
        " left=data.NAME,right=data.NAME"
    )


def _selected(value: Any, sides: Sequence[str], place: str) -> str | None:
    """The side that a pairwise result selects; None for a tie."""
    selected = value.get("selected") if isinstance(value, Mapping) else value
    meaning = {"left": sides[0], "right": sides[1], "none": None, "tie": None}
    return choice(selected, meaning, place)


def _named(who: Any) -> str | None:
    """The annotator, who may be an object."""
    who = who.get("email", who.get("id")) if isinstance(who, Mapping) else who
    return None if who is None else str(who)


def _comparison_field(record: Mapping) -> str | None:
    """The field of a JSON_MIN record that holds a pairwise result."""
    selects = lambda x: isinstance(x, Mapping) and "selected" in x
    for name, value in record.items():
        if isinstance(value, list) and len(value) == 1 and selects(value[0]):
            return name
        if selects(value):
            return name
    return None


def _label_studio_min(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """A row of a JSON_MIN export: one annotation, with the data beside it."""
    name = _comparison_field({x: record.peek(x) for x in record})
    prompt = next((x for x in PROMPTS if x in record), "prompt")
    value = record[name] if name is not None else None
    value = value[0] if isinstance(value, list) else value
    if not all(x in record for x in SHOWN):
        raise InputError(
            f"{where}: a JSON_MIN export does not say which text was on the left; it"
            f" has {', '.join(map(str, record))[:200]}; pass --fields"
            " left=NAME,right=NAME, or export JSON"
        )
    winner = _selected(value, SHOWN, f"{where}: field '{name}' 'selected'")
    answers = {x: record[x] for x in SHOWN}
    votes = [Vote(winner, _named(record.get("annotator")))]
    return by_votes((prompt, field(record, prompt, where)), answers, votes, rules)


def _argilla_matches(record: Mapping) -> bool:
    if has("fields", "responses")(record):
        return True
    if has("chosen", "rejected")(record) or "messages" in record:
        return False
    return any(
        name.endswith(".responses") or _is_question(value)
        for name, value in record.items()
    )


ARGILLA = Adapter("argilla", _argilla_matches, _argilla, several=each_vote)
LABEL_STUDIO = Adapter(
    "label_studio", has("data", "annotations"), _label_studio, several=each_vote
)
LABEL_STUDIO_MIN = Adapter(
    "label_studio_min",
    lambda record: "annotation_id" in record and _comparison_field(record) is not None,
    _label_studio_min,
)
