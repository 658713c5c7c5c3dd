"""Preference pairs from answers with scores, or from the answers of two models.

Empty answers make no pair, because nothing can be trained on them.  Answers that cannot
be used are left out before pairs are made, so that a prompt with other answers keeps
its pairs.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpref.data.answers import Answers, read_answers
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.records.best_pair import Rule, best_pair
from jaxpref.data.records.example import prompt_key, text_of
from jaxpref.data.sources import Source
from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class Usable:
    """Which answers may be in a pair, besides being not empty."""

    complete: bool = True
    """Only those that were not cut off (`ended` is not false)."""
    close: str | None = None
    """Only those with something after the end of a reasoning trace."""

    def __call__(self, answers: Answers) -> Answers:
        """The answers that may be in a pair."""
        return answers.only([n for n in range(len(answers)) if self.allows(answers, n)])

    def allows(self, answers: Answers, n: int) -> bool:
        """Whether one of the answers may be in a pair."""
        text = plain(answers.texts[n])
        if self.close is not None and not text.partition(self.close)[2].strip():
            return False
        cut = answers.ended is not None and not answers.ended[n]
        return bool(text.strip()) and not (cut and self.complete)


USABLE = Usable()


def plain(answer: Any) -> str:
    """The text of an answer; of messages, that of the last one."""
    if isinstance(answer, list):
        answer = answer[-1] if answer else ""
    return answer if isinstance(answer, str) else text_of(answer)


def ranked_pairs(
    answers: Answers,
    where: str,
    *,
    rule: Rule,
    min_gap: float = 0.0,
    min_score: float = -math.inf,
    max_std: float | None = None,
    most: int | None = None,
    usable: Usable = USABLE,
) -> Iterator[dict[str, Any]]:
    """Pairs of the answers of one record.

    Args:
      answers: with scores; answers without one are left out.
      where: "file row n", for errors.
      rule: which pairs; see `best_pair`.  Which answer "best-random" draws depends on
        the content of the record.
      min_gap: minimum difference of the scores, >= 0; equal scores never make a pair.
      min_score: minimum score of the chosen answer.
      max_std: answers whose score has a larger standard deviation are left out.
      most: maximum number of pairs.  Of "all", they are drawn by the content of the
        record (default: every pair); "best-worst" then also pairs the second best with
        the second worst, and so on (default: 1).
      usable: which answers may be in a pair.

    Raises:
      InputError: if there are no scores, or no standard deviations for `max_std`.
    """
    answers = _certain(usable(answers), where, max_std)
    scores = _known(answers)
    if rule == "all":
        order = sorted(range(len(scores)), key=lambda n: -scores[n])
        enough = lambda a, b: scores[a] > scores[b] and scores[a] >= min_score
        far = lambda a, b: enough(a, b) and scores[a] - scores[b] >= min_gap
        pairs = [(a, b) for a, b in itertools.combinations(order, 2) if far(a, b)]
        drawn = _drawn(len(pairs), most, key=_text_key(answers))
        pairs = [pairs[n] for n in drawn]
    elif rule == "best-worst":
        order = sorted(range(len(scores)), key=lambda n: -scores[n])
        pairs = [*zip(order, order[::-1])][: min(most or 1, len(order) // 2)]
        gaps = (scores[a] - scores[b] for a, b in pairs)
        pairs = [x for x, gap in zip(pairs, gaps) if gap > 0 and gap >= min_gap]
    else:
        one = best_pair(scores, rule, key=_text_key(answers), min_gap=min_gap)
        pairs = [] if one is None else [one]
    for a, b in pairs:
        if scores[a] >= min_score and answers.texts[a] != answers.texts[b]:
            yield _scored_pair(answers, a, answers, b)


def joined_pairs(
    better: Source, worse: Source, names: str, *, usable: Usable = USABLE
) -> Iterator[dict[str, Any]]:
    """Pairs of the answers of two models to the same prompts, one by one.

    The n-th answer of the first is preferred to the n-th of the second (delta learning,
    Geng et al. 2025, arXiv:2507.06187).  Prompts in only one of the files, and equal
    answers, are left out.

    Args:
      better: answers of the first model.
      worse: answers of the second model.
      names: both files, for errors.
      usable: which answers may be in a pair.

    Raises:
      InputError: if a prompt occurs twice in `worse`, or the files share none.
    """
    for found, other, _ in _matched(better, worse, names):
        for k in range(min(len(found), len(other))):
            both = usable.allows(found, k) and usable.allows(other, k)
            if both and found.texts[k] != other.texts[k]:
                yield _pair(found, k, other, k)


def best_against_worst(
    better: Source,
    worse: Source,
    names: str,
    *,
    rule: Rule,
    min_gap: float = 0.0,
    min_score: float = -math.inf,
    max_std: float | None = None,
    most: int = 1,
    usable: Usable = USABLE,
) -> Iterator[dict[str, Any]]:
    """The best answers of one model with worse ones of another, by their scores.

    With a later model's answers against those of the model before training, the
    rejected answers keep their low quality while the chosen ones improve, so the two
    remain distinct (temporal self-rewarding, Wang et al. 2025, arXiv:2508.06026,
    section 3).

    Args:
      better: scored answers; the best of each prompt are chosen.
      worse: scored answers to the same prompts.
      names: both files, for errors.
      rule: "best-worst": the best answer with the worst one of `worse`, the second best
        with the second worst, and so on; or "best-random": the best with a random one.
      min_gap: minimum difference of the scores, >= 0; the chosen one is always larger.
      min_score: minimum score of the chosen answer.
      max_std: answers whose score has a larger standard deviation are left out.
      most: maximum number of pairs of a prompt.
      usable: which answers may be in a pair.

    Raises:
      InputError: as `joined_pairs`, or if scores are missing.
    """
    for found, other, places in _matched(better, worse, names):
        found = _certain(usable(found), places[0], max_std)
        other = _certain(usable(other), places[1], max_std)
        chosen, rejected = _known(found), _known(other)
        best = sorted(range(len(chosen)), key=lambda n: -chosen[n])[:most]
        worst = sorted(range(len(rejected)), key=lambda n: rejected[n])
        if rule == "best-random" and best:
            limit = chosen[best[0]] - min_gap
            worst = [n for n in worst if rejected[n] <= limit]
            worst = [n for n in worst if rejected[n] < chosen[best[0]]]
            draws = hash_uniforms([_text_key(other)] * bool(worst), salt="best-random")
            worst = [worst[int(u * len(worst))] for u in draws]
        for a, b in zip(best, worst):
            gap = chosen[a] - rejected[b]
            differ = found.texts[a] != other.texts[b]
            if differ and gap > 0 and gap >= min_gap and chosen[a] >= min_score:
                yield _scored_pair(found, a, other, b)


def with_traces(pair: Mapping[str, Any], close: str) -> dict[str, Any]:
    """The pair with each answer split into its reasoning trace and what follows it.

    Args:
      pair: its answers contain `close`, such as "<think>a</think>b".
      close: what ends a trace.  What begins it, a tag in angle brackets, is removed.

    Returns:
      A record for `--objective bvpo`.
    """
    sides = {}
    for side in ("chosen", "rejected"):
        trace, _, answer = plain(pair[side]).partition(close)
        opening = close.replace("/", "", 1)
        trace = trace.strip().removeprefix(opening).strip()
        sides[side] = {"trace": trace, "answer": answer.strip()}
    return {**pair, **sides}


def _matched(
    better: Source, worse: Source, names: str
) -> Iterator[tuple[Answers, Answers, tuple[str, str]]]:
    """The answers to each prompt that is in both, and their places."""
    others: dict[str, tuple[Answers, str]] = {}
    for n in range(len(worse)):
        where = worse.location(n)
        found = read_answers(worse[n], where)
        key = _prompt(found, where)
        if key in others:
            raise InputError(
                f"{where}: its prompt occurs twice; keep one of the records"
            )
        others[key] = found, where
    shared = False
    for n in range(len(better)):
        where = better.location(n)
        found = read_answers(better[n], where)
        if (pair := others.get(_prompt(found, where))) is not None:
            shared = True
            yield found, pair[0], (where, pair[1])
    if not shared:
        raise InputError(
            f"{names}: no prompt is in both; sample both from the same prompts"
        )


def _certain(answers: Answers, where: str, max_std: float | None) -> Answers:
    """The answers that have a score that is certain enough."""
    if answers.scores is None:
        raise InputError(
            f"{where}: the answers have no scores; add them with `jaxpref score`, or "
            "pass --against without --rule"
        )
    if max_std is not None and answers.stds is None:
        raise InputError(
            f"{where}: the scores have no standard deviations 'score_std' for "
            "--max-std; score the answers with --uncertainty"
        )
    kept = [n for n, x in enumerate(answers.scores) if x is not None]
    if max_std is not None and answers.stds is not None:
        stds = [math.inf if x is None else x for x in answers.stds]
        kept = [n for n in kept if stds[n] <= max_std]
    return answers.only(kept)


def _known(answers: Answers) -> list[float]:
    return [x for x in answers.scores or () if x is not None]


def _drawn(count: int, most: int | None, *, key: str) -> list[int]:
    """Which of `count` pairs are kept, in their order."""
    if most is None or count <= most:
        return list(range(count))
    order = hash_uniforms([f"{key} {n}" for n in range(count)], salt="pairs")
    return sorted(sorted(range(count), key=lambda n: order[n])[:most])


def _scored_pair(a: Answers, m: int, b: Answers, n: int) -> dict[str, Any]:
    chosen, rejected = _known(a)[m], _known(b)[n]
    numbers = {"chosen_score": chosen, "rejected_score": rejected}
    return _pair(a, m, b, n) | numbers | {"margin": chosen - rejected}


def _pair(a: Answers, m: int, b: Answers, n: int) -> dict[str, Any]:
    pair = a.record | {"chosen": a.texts[m], "rejected": b.texts[n]}
    for name in ("generator", "rewards"):
        pair.pop(name, None)
    if a.ended is not None and b.ended is not None:
        pair["ended"] = [a.ended[m], b.ended[n]]
    return pair


def _prompt(answers: Answers, where: str) -> str:
    prompt = answers.record.get("prompt", answers.record.get("messages"))
    if not isinstance(prompt, str | list):
        raise InputError(
            f"{where}: no field 'prompt', by which the answers are matched; add one"
        )
    if isinstance(prompt, list) and len(prompt) == 1:
        # A user's turn has the key of its text, which a model without a chat template
        # was given.
        return prompt_key(text_of(prompt[0]))
    return prompt_key(prompt if isinstance(prompt, str) else tuple(prompt))


def _text_key(answers: Answers) -> str:
    whole: Mapping[str, Any] = answers.record
    return json.dumps([whole, answers.texts], sort_keys=True, default=str)
