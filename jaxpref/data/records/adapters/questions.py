"""Single answers: demonstrations, Dolly's instructions, and HaluEval's labels."""

from collections.abc import Mapping

from jaxpref.data.records.adapters.adapter import Adapter, PairRules, choice, has
from jaxpref.data.records.checks import field, text
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten

OTHERS = ("chosen", "rejected", "completion", "completions", "messages", "label")


def _renamed(prompt: str, answer: str):
    def rewrite(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
        fields = {
            "prompt": text(record, prompt, where),
            "completion": text(record, answer, where),
        }
        return [Rewritten(fields, {"prompt": prompt, "completion": answer})]

    return rewrite


def _dolly(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The instruction, its context in a paragraph of its own, and the response."""
    prompt = text(record, "instruction", where)
    if record.get("context"):
        prompt += "\n\n" + text(record, "context", where)
    fields = {"prompt": prompt, "completion": text(record, "response", where)}
    return [Rewritten(fields, {"prompt": "instruction", "completion": "response"})]


def _halueval(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """A label that is true for answers without hallucinations."""
    place = f"{where}: field 'hallucination'"
    meaning = {"no": True, "yes": False}
    label = choice(field(record, "hallucination", where), meaning, place)
    names = {"prompt": "user_query", "completion": "chatgpt_response"}
    fields = {name: text(record, own, where) for name, own in names.items()}
    return [Rewritten(fields | {"label": label}, names | {"label": "hallucination"})]


def _response_matches(record: Mapping) -> bool:
    rated = ("helpfulness", "instruction", *OTHERS)
    return has("prompt", "response", but=rated)(record)


QUESTION = Adapter(
    "question",
    has("question", "answer", but=("prompt", "instruction", *OTHERS)),
    _renamed("question", "answer"),
)
RESPONSE = Adapter("response", _response_matches, _renamed("prompt", "response"))
HALUEVAL = Adapter(
    "halueval", has("user_query", "chatgpt_response", "hallucination"), _halueval
)
DOLLY = Adapter("dolly", has("instruction", "response", but=OTHERS), _dolly)
