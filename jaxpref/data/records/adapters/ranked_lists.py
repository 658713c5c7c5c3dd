"""Lists of ranked answers: our own, Nectar, and those of fine-grained feedback."""

import itertools

from jaxpref.data.records.adapters.adapter import (
    SAME_SCORE,
    Adapter,
    PairRules,
    all_pairs,
    by_scores,
    choice,
    has,
    listed,
    number,
    pair,
)
from jaxpref.data.records.checks import field, kind, text
from jaxpref.data.records.fields import Record
from jaxpref.data.records.lists import is_graded
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

RANKS = "rank_chosen", "rank_rejected"
PREDICTIONS = tuple(f"prediction {n}" for n in range(1, 5))


def _scored_lists(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Pairs of `completions`, by their `scores`, or their `ranks`, where 1 is best."""
    name = "scores" if record.get("scores") is not None else "ranks"
    answers, numbers = (
        listed(field(record, x, where), f"{where}: field '{x}'")
        for x in ("completions", name)
    )
    if len(answers) != len(numbers):
        raise InputError(
            f"{where}: {len(answers)} 'completions', but {len(numbers)} numbers in"
            f" '{name}'; give one for each"
        )
    if len(answers) < 2:
        raise InputError(
            f"{where}: field 'completions' has {len(answers)} answers; remove the row"
        )
    prompt = "prompt", field(record, "prompt", where)
    named = [(f"completions {n + 1}", x) for n, x in enumerate(answers)]
    scores = [
        number(x, f"{where}: field '{name}' {n + 1}") for n, x in enumerate(numbers)
    ]
    if name == "scores":
        return by_scores(prompt, named, scores, rules)
    found = by_scores(prompt, named, [-x for x in scores], rules, names=RANKS)
    return [_positive(one) for one in found]


def _nectar(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Pairs of `answers` [{answer, rank}], where rank 1 is the best."""
    place = f"{where}: field 'answers'"
    answers, ranks = [], []
    for n, one in enumerate(listed(field(record, "answers", where), place)):
        if not isinstance(one, dict) or not {"answer", "rank"} <= one.keys():
            raise InputError(
                f"{place} {n + 1} must be an object with 'answer' and 'rank', but it is"
                f" {kind(one)}"
            )
        answers.append((f"answers {n + 1}", one["answer"]))
        ranks.append(number(one["rank"], f"{place} {n + 1} 'rank'"))
    if len(answers) < 2:
        raise InputError(f"{place} has {len(answers)} answers; remove the row")
    prompt = "prompt", field(record, "prompt", where)
    found = by_scores(prompt, answers, [-x for x in ranks], rules, names=RANKS)
    return [_positive(one) for one in found]


def _positive(one: Rewritten) -> Rewritten:
    """The pair with its ranks as the file has them."""
    ranks = {name: -one.fields[name] for name in RANKS if name in one.fields}
    return Rewritten({**one.fields, **ranks}, one.names, one.reason, one.part)


def _finegrained(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Pairs of four predictions, from the six comparisons in `preference`.

    With "all", each comparison that is not a tie is a pair; otherwise, a prediction's
    score is how many of the others it beats, minus how many beat it.
    """
    question = text(record, "question", where)
    prompt = "question", f"{_passages(record, where)}{question}\n"
    answers = [(name, text(record, name, where)) for name in PREDICTIONS]
    compared = [*itertools.combinations(range(len(answers)), 2)]
    place = f"{where}: field 'preference'"
    votes = listed(field(record, "preference", where), place)
    if len(votes) != len(compared):
        raise InputError(
            f"{place} must have {len(compared)} numbers, one for each pair of"
            f" predictions, but it has {len(votes)}"
        )
    meaning = {1: 1, 2: -1, 0: 0}
    signs = [choice(v, meaning, f"{place} {n + 1}") for n, v in enumerate(votes)]
    if rules.pairs != "all":
        scores = [0.0] * len(answers)
        for (a, b), sign in zip(compared, signs):
            scores[a] += sign
            scores[b] -= sign
        return by_scores(prompt, answers, scores, rules)
    return [
        pair(
            prompt,
            *(answers[n] for n in ((b, a) if sign < 0 else (a, b))),
            reason="" if sign else SAME_SCORE,
            part=f"pair {k + 1}",
        )
        for k, ((a, b), sign) in enumerate(zip(compared, signs))
    ]


def _passages(record: Record, where: str) -> str:
    """The passages that the question is about: a title and sentences each."""
    passages = listed(record.get("passages") or [], f"{where}: field 'passages'")
    blocks = []
    for n, passage in enumerate(passages):
        texts = isinstance(passage, list) and all(isinstance(x, str) for x in passage)
        if not texts:
            raise InputError(
                f"{where}: field 'passages' {n + 1} must be a list of texts, but it is"
                f" {kind(passage)}"
            )
        blocks.append(" ".join(passage) + "\n\n")
    return "".join(blocks)


SCORED_LISTS = Adapter("scored_lists", is_graded, _scored_lists, several=all_pairs)
NECTAR = Adapter("nectar", has("prompt", "answers"), _nectar, several=all_pairs)
FINEGRAINED = Adapter(
    "finegrained",
    has("question", "preference", *PREDICTIONS),
    _finegrained,
    several=all_pairs,
)
