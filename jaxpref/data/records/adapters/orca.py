"""Orca: `system`, `question` or `input`, and `chosen` and `rejected`.

A record with a field `system`, empty or not, is a conversation.  Pairs whose `status`
is "tie", as distilabel's judge found them, are dropped.
"""

from collections.abc import Mapping

from jaxpref.data.records.adapters.adapter import (
    TIE,
    Adapter,
    PairRules,
    has,
    one_of,
    pair,
    user,
)
from jaxpref.data.records.checks import field, text
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten


def _matches(record: Mapping) -> bool:
    others = ("prompt", "instruction", "messages", "conversations")
    pairs = has("chosen", "rejected", but=others)(record)
    return pairs and isinstance(record.get("question", record.get("input")), str)


def _rewrite(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    name, _ = one_of(record, ("question", "input"), where)
    prompt, system = text(record, name, where), None
    if "system" in record:
        prompt, system = [user(prompt)], record["system"] or None
    sides = [(x, field(record, x, where)) for x in ("chosen", "rejected")]
    reason = TIE if record.get("status") == "tie" else ""
    return [pair((name, prompt), *sides, system=system, reason=reason)]


ORCA = Adapter("orca", _matches, _rewrite)
