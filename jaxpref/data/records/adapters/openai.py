"""OpenAI's preference fine-tuning.

`input` with `messages` and `tools`, and messages in `preferred_output` and
`non_preferred_output`.
"""

from jaxpref.data.records.adapters.adapter import Adapter, PairRules, has, pair
from jaxpref.data.records.checks import field, kind
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError

HARMLESS = ("messages", "tools", "parallel_tool_calls")
"""What `input` may hold; the last one only limits how the model is served."""


def _rewrite(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    given = field(record, "input", where)
    if not isinstance(given, dict) or "messages" not in given:
        raise InputError(
            f"{where}: field 'input' must be an object with 'messages', but it is"
            f" {kind(given)}"
        )
    for name, value in given.items():
        if name not in HARMLESS and value not in (None, "", [], {}):
            raise InputError(
                f"{where}: field 'input.{name}' changes what the record means and is"
                " not read; remove it or the row"
            )
    sides = {x: field(record, x, where) for x in ("preferred_output",
                                                  "non_preferred_output")}  # fmt: skip
    prompt = "input.messages", given["messages"]
    tools = given.get("tools") or None
    return [pair(prompt, *sides.items(), tools=tools)]


OPENAI = Adapter("openai", has("preferred_output", "non_preferred_output"), _rewrite)
