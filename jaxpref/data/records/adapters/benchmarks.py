"""Benchmarks of reward models and judges, whose records have layouts of their own.

RewardBench 2 and RM-Bench, JudgeBench, LLMBar, the HHH evaluation, and PrefEval's
multiple-choice questions.  `jaxpref.evaluate.benchmarks` has their scoring rules.
"""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.adapters.adapter import (
    Adapter,
    PairRules,
    all_pairs,
    by_scores,
    by_winner,
    choice,
    has,
    listed,
    number,
)
from jaxpref.data.records.checks import field, text
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError


def _is_texts(value: Any) -> bool:
    several = isinstance(value, list) and len(value) > 0
    return several and all(isinstance(x, str) for x in value)


def _several_matches(record: Mapping) -> bool:
    return _is_texts(record.get("chosen")) and _is_texts(record.get("rejected"))


def _several(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """Right answers in `chosen` and wrong ones in `rejected`, in lists."""
    answers, scores = [], []
    for name, score in (("chosen", 1.0), ("rejected", 0.0)):
        found = listed(field(record, name, where), f"{where}: field '{name}'")
        if not found:
            raise InputError(f"{where}: field '{name}' must have at least one answer")
        answers += [(f"{name} {n + 1}", x) for n, x in enumerate(found)]
        scores += [score] * len(found)
    prompt = "prompt", field(record, "prompt", where)
    return by_scores(prompt, answers, scores, rules)


def _judge_bench(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """`label` is A>B or B>A."""
    answers = {x: field(record, x, where) for x in ("response_A", "response_B")}
    meaning = {"A>B": "response_A", "B>A": "response_B"}
    place = f"{where}: field 'label'"
    winner = choice(field(record, "label", where), meaning, place)
    return [by_winner(("question", field(record, "question", where)), answers, winner)]


def _llmbar(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """`label` is 1 or 2."""
    answers = {x: field(record, x, where) for x in ("output_1", "output_2")}
    meaning = {1: "output_1", 2: "output_2"}
    place = f"{where}: field 'label'"
    winner = choice(field(record, "label", where), meaning, place)
    return [by_winner(("input", text(record, "input", where)), answers, winner)]


def _hhh(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """`targets` has the answers in `choices`, and in `labels` 1 for the better one."""
    place = f"{where}: field 'targets'"
    targets = field(record, "targets", where)
    if not isinstance(targets, Mapping) or not {"choices", "labels"} <= targets.keys():
        raise InputError(f"{place} must be an object with 'choices' and 'labels'")
    choices, labels = (
        listed(targets[x], f"{place} '{x}'") for x in ("choices", "labels")
    )
    if len(choices) != len(labels) or len(choices) < 2:
        raise InputError(
            f"{place} must have at least two choices, and a label for each"
        )
    answers = [(f"choices {n + 1}", x) for n, x in enumerate(choices)]
    scores = [number(x, f"{place} label {n + 1}") for n, x in enumerate(labels)]
    return by_scores(("input", text(record, "input", where)), answers, scores, rules)


def _prefeval(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The first option follows the stated preference, the others do not."""
    name = "classification_task_options"
    options = listed(field(record, name, where), f"{where}: field '{name}'")
    if len(options) < 2:
        raise InputError(f"{where}: field '{name}' must have at least two options")
    stated, asked = (text(record, x, where) for x in ("preference", "question"))
    answers = [(f"{name} {n + 1}", x) for n, x in enumerate(options)]
    scores = [1.0] + [0.0] * (len(options) - 1)
    return by_scores(("question", f"{stated}\n\n{asked}"), answers, scores, rules)


SEVERAL = Adapter("chosen_lists", _several_matches, _several, several=all_pairs)
JUDGE_BENCH = Adapter(
    "judge_bench", has("question", "response_A", "response_B", "label"), _judge_bench
)
LLMBAR = Adapter("llmbar", has("input", "output_1", "output_2", "label"), _llmbar)
HHH = Adapter("hhh", has("input", "targets"), _hhh, several=all_pairs)
PREFEVAL = Adapter(
    "prefeval",
    has("preference", "question", "classification_task_options"),
    _prefeval,
    several=all_pairs,
)
AS_LISTS = (SEVERAL, PREFEVAL)
"""Formats whose records are lists, unless pairs are asked for."""
