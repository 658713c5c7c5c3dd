"""Alpaca: `instruction` and `input`, with an `output` or a pair of answers.

The prompt is the instruction and, on the next line, the input.  The pair is in `chosen`
and `rejected`, or in an `output` of two, the better one first.  LLaMA-Factory's
`system` and `history` make the record a conversation.
"""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.records.adapters.adapter import (
    Adapter,
    PairRules,
    assistant,
    has,
    user,
)
from jaxpref.data.records.checks import field, kind, text
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError


def _matches(record: Mapping) -> bool:
    others = ("prompt", "completions", "generations", "messages", "conversations")
    one, two = has("instruction", "output"), has("instruction", "chosen", "rejected")
    return (one(record) or two(record)) and not any(x in record for x in others)


def _rewrite(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    prompt = text(record, "instruction", where)
    if record.get("input"):
        prompt += "\n" + text(record, "input", where)
    names, fields = {"prompt": "instruction"}, _answers(record, where)
    if "chosen" not in record:
        names |= dict.fromkeys(fields, "output")
    if not (record.get("system") or record.get("history")):
        return [Rewritten({"prompt": prompt, **fields}, names)]
    turns = [*_history(record, where), user(prompt)]
    return [Rewritten({"prompt": turns, **_system(record), **fields}, names)]


def _answers(record: Record, where: str) -> dict[str, Any]:
    if "chosen" in record:
        return {x: field(record, x, where) for x in ("chosen", "rejected")}
    output = field(record, "output", where)
    if not isinstance(output, list):
        return {"completion": output}
    if len(output) != 2:
        raise InputError(
            f"{where}: field 'output' must have two answers, the better one first, but"
            f" it has {len(output)}"
        )
    return {"chosen": output[0], "rejected": output[1]}


def _system(record: Record) -> dict[str, Any]:
    return {"system": record["system"]} if record.get("system") else {}


def _history(record: Record, where: str) -> list[dict[str, str]]:
    """The turns of earlier rounds [question, answer]."""
    turns = []
    for n, round in enumerate(record.get("history") or []):
        texts = isinstance(round, list) and all(isinstance(x, str) for x in round)
        if not texts or len(round) != 2:
            raise InputError(
                f"{where}: field 'history' round {n + 1} must be a question and an"
                f" answer, but it is {kind(round)}"
            )
        turns += [user(round[0]), assistant(round[1])]
    return turns


ALPACA = Adapter("alpaca", _matches, _rewrite)
