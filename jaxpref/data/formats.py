"""From a record to an example: the field's formats, and every way a record is wrong."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jaxpref.data.labels import NONE, LabelFields, read_labels
from jaxpref.errors import InputError

Message = dict[str, Any]

HUMAN_TURN = "Human:"
ASSISTANT_TURN = "\n\nAssistant:"
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHARACTERS = 1_000_000
"""Longest text of a record: some 250,000 tokens, more than a row is trained on."""

IDENTICAL = "chosen and rejected are identical"
PROMPTS_DIFFER = "chosen and rejected do not share the prompt"
EMPTY = "a completion is empty"
HUMAN_LAST = "a dialogue does not end with the assistant's turn"

_COMPLETIONS = ("completion", "messages", "chosen")


@dataclasses.dataclass(frozen=True)
class Example:
    """One record, normalised: a prompt and its completions.

    Either all strings, or a conversation: the prompt a tuple of messages and each
    completion the assistant message that follows it.  Where there are reasoning traces,
    completions are the answers after them.
    """

    prompt: str | tuple[Message, ...]
    completions: tuple[str, ...] | tuple[Message, ...]
    flip: bool = False
    annotator: str | None = None
    labels: dict[str, float] = dataclasses.field(default_factory=dict)
    traces: tuple[tuple[str, ...], ...] = ()
    """For each completion its traces, one at least; nothing where there are none."""
    empty: bool = False
    """The completions are given after an empty trace, which belongs to the prompt."""

    @property
    def is_conversation(self) -> bool:
        """Whether the tokenizer's chat template renders it."""
        return isinstance(self.prompt, tuple)

    @property
    def is_identical(self) -> bool:
        """Whether this pair's two sides are the same, traces included."""
        same = lambda sides: len(sides) == 2 and sides[0] == sides[1]
        return same(self.completions) and (not self.traces or same(self.traces))

    def num_characters(self) -> int:
        """Characters of all texts."""
        prompt = self.prompt if self.is_conversation else (self.prompt,)
        parts = (*prompt, *self.completions, *(t for side in self.traces for t in side))
        return sum(len(x if isinstance(x, str) else x["content"]) for x in parts)

    def content_id(self) -> str:
        """16 hexadecimal digits of a SHA-256: prompt, completions, annotator, traces.

        Without traces it is the same whether the run mixes in an empty one or not.
        """
        content = [self.prompt, self.completions, self.annotator]
        content += [self.traces] if self.traces else []
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_key(prompt: str | tuple[Message, ...]) -> str:
    """Equal for prompts that count as one: outer white space of texts set aside."""
    if isinstance(prompt, str):
        return prompt.strip()
    bare = [message | {"content": message["content"].strip()} for message in prompt]
    return json.dumps(bare, sort_keys=True)


def expand(example: Example) -> list[Example]:
    """One example for each k: the k-th traces of all sides; shorter lists begin again.

    An example without traces stands for itself.
    """
    if not example.traces:
        return [example]
    return [
        dataclasses.replace(
            example, traces=tuple((side[k % len(side)],) for side in example.traces)
        )
        for k in range(max(map(len, example.traces)))
    ]


def parse(
    record: Any,
    where: str,
    *,
    sides: int,
    drop_empty: bool = False,
    labels: LabelFields = NONE,
) -> Example | str:
    r"""Read one record in whichever format it has.

    Pairs (sides = 2) are `prompt`, `chosen`, `rejected` as strings or as lists of
    messages ({"role": ..., "content": ...}), or whole conversations in `chosen` and
    `rejected` that share all but the last message, or whole dialogues
    `\n\nHuman: ...\n\nAssistant: ...` that share all but the last turn.  Completions
    (sides = 1) are `prompt` and `completion`, or `messages`, or the chosen side of a
    pair.  `flip` (true or false) and `annotator` (string or integer) are optional.  The
    completion is always the last assistant turn.  A `prompt` that a conversation or a
    dialogue repeats is taken once.

    A completion beside a `prompt` (string or messages) may also be {"trace": ...,
    "answer": ...}: the reasoning, one string or a list of several samples of it, and
    the answer after it, strings without the markers between them.  Both sides have a
    trace, or neither.

    Args:
      record: as decoded from the file.
      where: "file row n", for errors.
      sides: K, completions of a prompt.
      drop_empty: return EMPTY for an empty completion instead of raising.  Dialogues,
        whose published sets hold some, are always treated so.
      labels: fields with numbers that a loss reads.

    Returns:
      The example, or the reason (one of the constants above) why a well-formed record
      cannot be used.

    Raises:
      InputError: the record is malformed; names row and field.
    """
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a record must be a JSON object, but this is {_kind(record)}"
        )
    flip, annotator = _flip(record, where), _annotator(record, where)
    names = _completion_names(record, sides)
    if any(_is_traced(record.get(name)) for name in names):
        parsed = _parse_traced(record, names, where, drop_empty)
        if isinstance(parsed, str):
            return parsed
        numbers = read_labels(record, where, labels)
        return dataclasses.replace(
            parsed, flip=flip, annotator=annotator, labels=numbers
        )
    values = [_value(record, name, where) for name in names]
    prompt = _value(record, "prompt", where) if "prompt" in record else None
    if any(isinstance(part, list) for part in (prompt, *values)):
        split = [_conversation(prompt, *pair, where) for pair in zip(names, values)]
    elif prompt is None or _in_dialogues(prompt, values):
        prompt = None
        split = [_dialogue(*pair, where) for pair in zip(names, values)]
        if any("\n\n" + HUMAN_TURN in completion for _, completion in split):
            return HUMAN_LAST
    else:
        split = [(prompt, value) for value in values]
    for name, (_, completion) in zip(names, split):
        text = completion if isinstance(completion, str) else completion["content"]
        if text.strip():
            continue
        if drop_empty or prompt is None and isinstance(completion, str):
            return EMPTY
        raise InputError(
            f"{where}: field '{name}' is an empty completion; remove the row, or set"
            " drop_empty"
        )
    if len(split) == 2 and split[0] == split[1]:
        return IDENTICAL
    if len(split) == 2 and split[0][0] != split[1][0]:
        return PROMPTS_DIFFER
    completions = tuple(completion for _, completion in split)
    numbers = read_labels(record, where, labels)
    return Example(split[0][0], completions, flip, annotator, numbers)


def parse_prompt(record: Any, where: str) -> str | tuple[Message, ...] | None:
    """The prompt that `parse` finds, or that of a record without any completion.

    Returns:
      A string or messages; None where the record is one that `parse` drops.

    Raises:
      InputError: the record is malformed, or its prompt has no messages.
    """
    completions = isinstance(record, dict) and any(
        record.get(name) is not None for name in _COMPLETIONS
    )
    if isinstance(record, dict) and "prompt" in record and not completions:
        prompt = _value(record, "prompt", where)
        if prompt == []:
            raise InputError(f"{where}: field 'prompt' has no messages; give one")
        return prompt if isinstance(prompt, str) else tuple(prompt)
    example = parse(record, where, sides=1, drop_empty=True)
    return None if isinstance(example, str) else example.prompt


def _completion_names(record: dict, sides: int) -> tuple[str, ...]:
    if sides == 2:
        return ("chosen", "rejected")
    present = [x for x in _COMPLETIONS if x in record]
    return (present[0] if present else "completion",)


def _is_traced(value: Any) -> bool:
    return isinstance(value, dict) and not {"trace", "answer"}.isdisjoint(value)


def _parse_traced(
    record: dict, names: Sequence[str], where: str, drop_empty: bool
) -> Example | str:
    """A record whose completions are {"trace": ..., "answer": ...}."""
    prompt = _value(record, "prompt", where)
    if prompt == []:
        raise InputError(f"{where}: field 'prompt' has no messages; give one")
    values = {name: _field(record, name, where) for name in names}
    for name, value in values.items():
        if not _is_traced(value):
            raise InputError(
                f"{where}: field '{name}' must be an object of trace and answer as the"
                f" other side is, but it is {_kind(value)}"
            )
    traces = tuple(_traces(values[name], f"{where}: field '{name}'") for name in names)
    if any(traces) and not all(traces):
        without = names[traces.index(())]
        raise InputError(
            f"{where}: field '{without}' has no 'trace', but the other side has one;"
            " give both sides a trace, or neither"
        )
    answers = [_answer(values[name], f"{where}: field '{name}'") for name in names]
    for name, answer in zip(names, answers):
        if not answer.strip():
            if drop_empty:
                return EMPTY
            raise InputError(
                f"{where}: field '{name}' has an empty 'answer'; remove the row, or set"
                " drop_empty"
            )
    if isinstance(prompt, list):
        prompt = tuple(prompt)
        answers = [{"role": "assistant", "content": answer} for answer in answers]
    traces = traces if any(traces) else ()
    example = Example(prompt, tuple(answers), traces=traces)
    return IDENTICAL if example.is_identical else example


def _traces(value: dict, place: str) -> tuple[str, ...]:
    """The traces of one side; none where there is no such field, or null."""
    traces = value.get("trace")
    if traces is None:
        return ()
    listed = traces if isinstance(traces, list) else [traces]
    if not listed:
        raise InputError(
            f"{place} has an empty list as 'trace'; list one at least, or leave 'trace'"
            " out on both sides"
        )
    for n, trace in enumerate(listed):
        if not isinstance(trace, str):
            which = f" {n + 1}" if isinstance(traces, list) else ""
            raise InputError(
                f"{place} 'trace'{which} must be a string, but it is {_kind(trace)}"
            )
        _checked_text(trace, f"{place} 'trace'")
    return tuple(listed)


def _answer(value: dict, place: str) -> str:
    if value.get("answer") is None:
        raise InputError(f"{place} has no 'answer'; give the text after the trace")
    if not isinstance(value["answer"], str):
        raise InputError(
            f"{place} 'answer' must be a string, but it is {_kind(value['answer'])}"
        )
    return _checked_text(value["answer"], f"{place} 'answer'")


def _field(record: dict, name: str, where: str) -> Any:
    if name not in record:
        raise InputError(
            f"{where}: no field '{name}'; the record has"
            f" {', '.join(map(str, record))[:200] or 'no fields'}"
        )
    return record[name]


def _value(record: dict, name: str, where: str) -> str | list[Message]:
    """A text or a list of messages, checked."""
    value = _field(record, name, where)
    if isinstance(value, dict) and set(value) >= {"role", "content"}:
        value = _transpose(value)  # a sequence of structs, as two packages store it
    if isinstance(value, list):
        return [
            _message(message, f"{where}: field '{name}' message {n + 1}")
            for n, message in enumerate(value)
        ]
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field '{name}' must be a string or a list of messages, but it is"
            f" {_kind(value)}"
        )
    return _checked_text(value, f"{where}: field '{name}'")


def _transpose(columns: dict) -> Any:
    if not all(isinstance(x, list) for x in columns.values()):
        return columns
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(
            f'{place} must be {{"role": ..., "content": ...}}, but it is'
            f" {_kind(message)}"
        )
    if message.get("role") not in ROLES:
        raise InputError(
            f"{place}: role must be one of {', '.join(ROLES)}, but it is"
            f" {message.get('role')!r}"
        )
    if not isinstance(message.get("content"), str):
        raise InputError(
            f"{place}: content must be a string, but it is"
            f" {_kind(message.get('content'))}"
        )
    _checked_text(message["content"], place)
    # Columnar stores fill absent keys with null; a template must not see them.
    return {key: value for key, value in message.items() if value is not None}


def _checked_text(text: str, place: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{place} has {len(text):,} characters; the most is {MAX_CHARACTERS:,};"
            " shorten it or remove the row"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} holds half a surrogate pair at character {error.start + 1}, which"
            " is not Unicode text"
        ) from None
    return text


def _conversation(
    prompt: str | list[Message] | None,
    name: str,
    value: str | list[Message],
    where: str,
) -> tuple[tuple[Message, ...], Message]:
    """Messages before the last assistant turn, and that turn."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    if not value or value[-1]["role"] != "assistant":
        raise InputError(f"{where}: field '{name}' must end with an assistant message")
    turns = _joined(prompt or [], value[:-1])
    if turns is None:
        raise InputError(
            f"{where}: field '{name}' begins with another question than 'prompt' asks;"
            " remove one of the two"
        )
    if not turns:
        raise InputError(
            f"{where}: field '{name}' has no message before the answer and there is no"
            " 'prompt'"
        )
    return tuple(turns), value[-1]


def _joined(prompt: list[Message], turns: list[Message]) -> list[Message] | None:
    """The prompt, then the turns; what both hold once; None if they contradict."""
    asked, said = (
        [(message["role"], message["content"].strip()) for message in part]
        for part in (prompt, turns)
    )
    for size in range(min(len(asked), len(said)), 0, -1):
        if asked[-size:] == said[:size]:
            return prompt + turns[size:]
    if not asked or not said or said[0][0] in ("assistant", "tool"):
        return prompt + turns
    if any(said[n : n + len(asked)] == asked for n in range(len(said))):
        return turns
    follows = said[0][0] == "user" and asked[-1][0] != "user"
    return prompt + turns if follows else None


def _in_dialogues(prompt: str, values: list[str]) -> bool:
    """Whether the values are whole dialogues, one at least with this prompt in it."""
    parts = [value.rpartition(ASSISTANT_TURN) for value in values]
    whole = all(turn and x.lstrip().startswith(HUMAN_TURN) for x, turn, _ in parts)
    return whole and any(prompt.strip() in x + turn for x, turn, _ in parts)


def _dialogue(name: str, text: str, where: str) -> tuple[str, str]:
    """Split at the last assistant turn: earlier answers belong to the prompt."""
    before, turn, completion = text.rpartition(ASSISTANT_TURN)
    if not turn or not before.lstrip().startswith(HUMAN_TURN):
        raise InputError(
            f"{where}: no field 'prompt', and field '{name}' is not a dialogue of"
            " '\\n\\nHuman: ...\\n\\nAssistant: ...'; add a prompt"
        )
    return before + turn, completion


def _flip(record: dict, where: str) -> bool:
    value = record.get("flip")
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InputError(
        f"{where}: field 'flip' must be true or false, but it is {_kind(value)}"
    )


def _annotator(record: dict, where: str) -> str | None:
    value = record.get("annotator")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(
            f"{where}: field 'annotator' must be a string or an integer, but it is"
            f" {_kind(value)}"
        )
    return _checked_text(str(value), f"{where}: field 'annotator'")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")
