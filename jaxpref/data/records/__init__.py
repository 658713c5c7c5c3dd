"""Record formats, one file each: `matches(record, sides)` and `parse(record, ...)`.

To add a format, write an adapter (`adapters/`) that rewrites its records in the names
of one of these; or, if that is not possible, a module with these two functions, and
add it to `FORMATS`.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from jaxpref.data.columns import field_value, read_columns
from jaxpref.data.records import (
    dialogues,
    labeled,
    lists,
    messages,
    own_prompts,
    pairs,
    ranked,
    sharegpt,
    traces,
)
from jaxpref.data.records.checks import (
    COMPLETIONS,
    completion_fields,
    kind,
    prompt_and_messages,
    read_annotator,
    read_ended,
    read_flip,
    text_or_messages,
)
from jaxpref.data.records.example import EMPTY as EMPTY
from jaxpref.data.records.example import HUMAN_LAST as HUMAN_LAST
from jaxpref.data.records.example import IDENTICAL as IDENTICAL
from jaxpref.data.records.example import PROMPTS_DIFFER as PROMPTS_DIFFER
from jaxpref.data.records.example import THOUGHT_FIELDS as THOUGHT_FIELDS
from jaxpref.data.records.example import Example as Example
from jaxpref.data.records.example import Message as Message
from jaxpref.data.records.example import expand as expand
from jaxpref.data.records.example import prompt_key as prompt_key
from jaxpref.data.records.example import text_of as text_of
from jaxpref.data.records.fields import FieldUse as FieldUse
from jaxpref.data.records.fields import Record, check_unread
from jaxpref.data.records.template import for_template, read_template
from jaxpref.data.records.turns import with_all_turns
from jaxpref.data.records.view import View
from jaxpref.errors import InputError


class Format(Protocol):
    """One record format; its functions may assume that the record is a dict."""

    def matches(self, record: Mapping, sides: Any) -> bool:
        """Whether the record has this format, well formed or not."""
        ...

    def parse(
        self, record: Mapping, where: str, *, sides: Any, drop_empty: bool
    ) -> Example | str:
        """Returns the example, or the reason why a valid record cannot be used.

        Args:
          record: the decoded record; `matches` is true for it.
          where: "file row n", for errors.
          sides: K, completions of a prompt; None for lists, which only `lists` reads.
          drop_empty: return EMPTY for an empty completion instead of raising.

        Raises:
          InputError: if the record is malformed; the message names row and field.
        """
        ...


FORMATS: dict[str, Format] = {
    "lists": lists,
    "own_prompts": own_prompts,
    "traces": traces,
    "sharegpt": sharegpt,
    "ranked": ranked,
    "messages": messages,
    "dialogues": dialogues,
    "pairs": pairs,
}
"""All formats by name; the first that matches a record parses it."""


def parse(
    record: Any,
    where: str,
    *,
    sides: int | None,
    drop_empty: bool = False,
    columns: Mapping[str, str] = MappingProxyType({}),
    ignore_fields: Collection[str] = (),
    values: Collection[str] = (),
    fields: FieldUse | None = None,
    allow_own_prompts: bool = False,
    all_turns: bool = False,
) -> Example | str:
    """Parses a record in any of the formats.

    In addition to the fields of its format, a record may have `flip` (true or false),
    `annotator` (a string or an integer), `ended` (whether each answer is complete), and
    the numbers of `columns`.  If it holds messages, it may also have `system`,
    `tools` and `chat_template_kwargs`.

    Args:
      record: the decoded record.
      where: "file row n", for errors.
      sides: K, completions of a prompt; 2 for pairs, 1 for single completions, None
        for lists, which have as many as the record holds.
      drop_empty: return EMPTY for an empty completion instead of raising.
      columns: fields with numbers that a loss reads, by column.
      ignore_fields: fields to ignore.
      values: fields to keep as they are, in `Example.values`; None if absent.
      fields: counts which fields are read.
      allow_own_prompts: whether the answers of any format may follow different prompts.
      all_turns: whether all assistant turns of a conversation are trained on; see
        `turns`.

    Returns:
      The example, or the reason why a valid record cannot be used.

    Raises:
      InputError: the record is malformed, or its meaning depends on a field that is not
        read; names row and field.
    """
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a record must be a JSON object, but this is {kind(record)}"
        )
    tracked = Record(record, ignored=ignore_fields)
    try:
        example, format = _parse(
            tracked,
            where,
            sides=sides,
            drop_empty=drop_empty,
            columns=columns,
            values=values,
            allow_own_prompts=allow_own_prompts,
            all_turns=all_turns,
        )
    except InputError as error:
        if tracked.origin is None:
            raise
        raise tracked.origin.explained(error) from None
    if fields is not None and not isinstance(example, str):
        ignored = [name for name in ignore_fields if tracked.has(name)]
        rendered = example.is_conversation
        fields.add(tracked, ignored, format, rendered=rendered)
    return example


def _parse(
    record: Record,
    where: str,
    *,
    sides: int | None,
    drop_empty: bool,
    columns: Mapping[str, str],
    values: Collection[str],
    allow_own_prompts: bool,
    all_turns: bool,
) -> tuple[Example | str, str]:
    """The example or the reason why there is none, and the record's format."""
    origin = record.origin
    flip, annotator = read_flip(record, where), read_annotator(record, where)
    if origin is not None and origin.reason:
        return origin.reason, origin.format
    for others in (labeled, lists):
        others.check_other(record, where, sides)
    name = origin.format if origin is not None and origin.native else None
    name = name or _format_of(record, sides)
    if name is None:
        raise _unknown(record, where, sides)
    example = FORMATS[name].parse(record, where, sides=sides, drop_empty=drop_empty)
    if all_turns and not isinstance(example, str) and FORMATS[name] is not own_prompts:
        example = with_all_turns(example, record.peek("prompt"))
    if not isinstance(example, str) and example.own_prompts:
        if not allow_own_prompts and FORMATS[name] is not own_prompts:
            example = PROMPTS_DIFFER
    name = (origin and origin.format) or name
    if isinstance(example, str):
        return example, name
    if sides is not None and len(example.completions) != sides:
        raise InputError(
            f"{where}: the record has {len(example.completions)} completions instead of"
            f" {sides}"
        )
    read = [
        read_template(record, where, dataclasses.replace(example, prompt=prompt))
        for prompt in example.prompts
    ]
    prompts, (variables, *_) = zip(*read)
    ended = example.ended  # formats in another order read it themselves
    if sides is not None and "ended" not in record.read:
        ended = read_ended(record, where, sides)
    everything = record.everything()
    example = dataclasses.replace(
        example,
        prompt=prompts[0],
        own_prompts=prompts if example.own_prompts else (),
        variables=variables,
        flip=flip,
        annotator=annotator,
        numbers=example.numbers | read_columns(everything, where, columns),
        ended=ended,
        values={name: field_value(everything, name) for name in values},
    )
    check_unread(record, where)
    return example, name


def parse_prompt(
    record: Any,
    where: str,
    *,
    as_turns: bool = True,
    ignore_fields: Collection[str] = (),
) -> Example | None:
    """The prompt of a record, which may have no completion.

    A conversation that ends with a user's turn is a prompt, whatever its field.

    Args:
      record: the decoded record.
      where: "file row n", for errors.
      as_turns: whether a prompt that is a text becomes a user's turn if the record has
        fields for the chat template, such as `system`.
      ignore_fields: fields to ignore.

    Returns:
      An example, with a completion if the record has one; None if `parse` would drop
      the record.

    Raises:
      InputError: the record is malformed, or its prompt has no messages.
    """
    if isinstance(record, View):
        record = record.usable()  # a tie has a prompt, too
    elif isinstance(record, dict):
        record = {k: v for k, v in record.items() if k not in ignore_fields}
    if isinstance(record, dict):
        record = messages.with_prompt(record)
    completions = isinstance(record, dict) and any(
        record.get(name) is not None for name in (*COMPLETIONS, "ranking")
    )
    if isinstance(record, dict) and not completions:
        record = sharegpt.with_prompt(record, where)
        if "prompt" in record:
            tracked = Record(record)
            example = Example(prompt_and_messages(tracked, where), ())
            if as_turns and isinstance(example.prompt, str) and for_template(record):
                turn = {"role": "user", "content": example.prompt}
                example = dataclasses.replace(example, prompt=(turn,))
            prompt, variables = read_template(tracked, where, example)
            check_unread(tracked, where)
            return dataclasses.replace(example, prompt=prompt, variables=variables)
    if isinstance(record, dict) and record.get("rejected") is not None:
        # Both answers say whether the prompt is followed by a thinking block.
        with contextlib.suppress(InputError):
            pair = parse(record, where, sides=2, drop_empty=True)
            if not isinstance(pair, str):
                return pair
    example = parse(record, where, sides=1, drop_empty=True)
    return None if isinstance(example, str) else example


def _format_of(record: Record, sides: int | None) -> str | None:
    """The first format that matches; looking does not count as reading."""
    read = set(record.read)
    found = next((k for k, x in FORMATS.items() if x.matches(record, sides)), None)
    record.read.clear()
    record.read.update(read)
    return found


def _unknown(record: Mapping, where: str, sides: Any) -> InputError:
    """The error for a record that no format matches."""
    names = completion_fields(record, sides)
    for name in names:
        text_or_messages(record, name, where)  # raises what is wrong with the field
    return dialogues.not_a_dialogue(record, names[0], where)
