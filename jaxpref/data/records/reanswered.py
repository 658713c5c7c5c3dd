"""A record without its answers, to be given new ones."""

from collections.abc import Mapping
from typing import Any

from jaxpref.data.columns import ARRAYS, WEIGHT
from jaxpref.data.records.example import Example
from jaxpref.data.records.fields import MEANINGFUL, SCORES
from jaxpref.data.records.view import View

OF_PROMPT = ("tools", "chat_template_kwargs")
"""Fields that the chat template reads and that are not part of the messages."""
OF_ANSWERS = frozenset(
    "completion completions outputs chosen rejected messages conversations"
    " chosen_prompt rejected_prompt ranking scores score score_std rewards"
    " chosen_score_std rejected_score_std margin_std p_chosen flip flip_rate"
    " agreement num_votes annotator generator candidates".split()
)
"""Fields of the formats of `parse` that are about the answers or the labels."""


def without_answers(record: Mapping[str, Any], example: Example) -> dict[str, Any]:
    """The fields of a record that stay true of other answers to its prompt.

    `prompt` is the text or the messages that were rendered, so that the record is
    rendered in the same way when it is read again.  Fields with other names than those
    of `parse`, such as a reference answer, stay.

    Args:
      record: as in its file, or as an adapter rewrote it.
      example: its prompt.
    """
    if isinstance(record, View):
        record = record.origin.record
    scores = {name for names in SCORES for name in names}
    # What the template reads comes from the example, which lacks ignored fields.
    dropped = OF_ANSWERS | MEANINGFUL | ARRAYS | {WEIGHT, *OF_PROMPT} | scores
    kept = {name: x for name, x in record.items() if name.lower() not in dropped}
    prompt = example.prompt
    kept["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    tools = example.variables.get("tools")
    variables = {k: v for k, v in example.variables.items() if k != "tools"}
    given = {"tools": tools, "chat_template_kwargs": variables}
    return kept | {name: value for name, value in given.items() if value}
