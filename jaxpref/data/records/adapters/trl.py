"""Formats of TRL that have no prompt of their own: implicit prompts and plain text.

`chosen` and `rejected` may begin with the same text, which is the prompt; `messages`
may hold the prompt of two answers; a `conversation` or a `text` is trained on as it is.
"""

import os
from collections.abc import Mapping

from jaxpref.data.records.adapters.adapter import Adapter, PairRules, has
from jaxpref.data.records.checks import field, is_message, text, text_or_messages
from jaxpref.data.records.dialogues import HUMAN_TURN
from jaxpref.data.records.example import IDENTICAL
from jaxpref.data.records.fields import Record
from jaxpref.data.records.view import Rewritten
from jaxpref.errors import InputError


def _implicit_matches(record: Mapping) -> bool:
    """Whether both answers begin with the same words, and nothing else is a prompt."""
    if not has("chosen", "rejected", but=("prompt", "messages"))(record):
        return False
    sides = record["chosen"], record["rejected"]
    others = (v for k, v in record.items() if k not in ("chosen", "rejected"))
    if any(isinstance(value, str) and value.strip() for value in others):
        return False  # one of them could be the prompt, by another name
    texts = all(isinstance(x, str) for x in sides)
    dialogue = any(str(x).lstrip().startswith(HUMAN_TURN) for x in sides)
    if not texts or dialogue:
        return False
    return sides[0] == sides[1] or bool(_shared(*sides))


def _implicit(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The pair whose prompt is what both answers begin with."""
    sides = [text(record, name, where) for name in ("chosen", "rejected")]
    prompt = _shared(*sides)
    if sides[0] == sides[1]:
        fields = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        return [Rewritten(fields, reason=IDENTICAL)]
    if not prompt:
        raise InputError(
            f"{where}: no field 'prompt', and 'chosen' and 'rejected' do not begin with"
            " the same words, which would be the prompt; add a field 'prompt'"
        )
    chosen, rejected = (side[len(prompt) :] for side in sides)
    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return [Rewritten(fields)]


def _shared(first: str, second: str) -> str:
    """The whole words with which two texts begin; white space belongs to the answers.

    TRL splits at the first character that differs, which may be inside a word.
    """
    shared = os.path.commonprefix([first, second])
    after = (text[len(shared) : len(shared) + 1] for text in (first, second))
    if not all(character.isspace() for character in after):
        spaces = [n for n, character in enumerate(shared) if character.isspace()]
        shared = shared[: spaces[-1] if spaces else 0]
    return shared.rstrip()


def _chat_matches(record: Mapping) -> bool:
    """Whether there are answers to `messages` that end without one."""
    turns = record.get("messages")
    if not has("messages", "chosen", "rejected", but=("prompt",))(record):
        return False
    last = turns[-1] if isinstance(turns, list) and turns else {}
    return not (is_message(last) and last.get("role") == "assistant")


def _chat(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """The pair whose prompt is in `messages`."""
    names = {"prompt": "messages", "chosen": "chosen", "rejected": "rejected"}
    turns = text_or_messages(record, "messages", where)
    if isinstance(turns, str):
        raise InputError(f"{where}: field 'messages' must be messages, not a string")
    sides = {x: field(record, x, where) for x in ("chosen", "rejected")}
    return [Rewritten({"prompt": turns, **sides}, names)]


def _conversation(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """A demonstration under the name of `messages`."""
    turns = text_or_messages(record, "conversation", where)
    return [Rewritten({"messages": turns}, {"messages": "conversation"})]


def _text(record: Record, where: str, rules: PairRules) -> list[Rewritten]:
    """A text without a prompt, for `--loss sft`."""
    whole = text(record, "text", where)
    return [Rewritten({"prompt": "", "completion": whole}, {"completion": "text"})]


ANSWERS = (
    *("prompt", "completion", "completions", "chosen", "rejected", "messages"),
    *("conversations", "conversation", "question", "instruction", "answers", "label"),
)
"""Fields with which a text is not the whole record."""

IMPLICIT = Adapter("implicit", _implicit_matches, _implicit)
CHAT = Adapter("chat", _chat_matches, _chat)
CONVERSATION = Adapter(
    "conversation",
    has("conversation", but=("prompt", "chosen", "messages", "conversations")),
    _conversation,
)
TEXT = Adapter(
    "text",
    lambda record: (
        isinstance(record.get("text"), str)
        and not any(name in record for name in ANSWERS)
        and not {"completion_a", "answer_a", "response_a"} & record.keys()
    ),
    _text,
)
