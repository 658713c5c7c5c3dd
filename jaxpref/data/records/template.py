"""Fields that the chat template reads: `tools`, `system`, `chat_template_kwargs`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.records.checks import checked_text, kind
from jaxpref.data.records.example import Example, Message
from jaxpref.errors import InputError

RESERVED = frozenset(
    "conversation messages tools chat_template add_generation_prompt"
    " continue_final_message tokenize padding truncation max_length return_tensors"
    " return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""Arguments of `apply_chat_template` that a record may not set."""


def read_template(
    record: Mapping, where: str, example: Example
) -> tuple[str | tuple[Message, ...], dict[str, Any]]:
    """The prompt with the record's system turn, and variables for the template.

    Raises:
      InputError: if a field is malformed, or the prompt is a text, which no template
        renders.
    """
    variables = _variables(record, where)
    system = _system(record, where)
    given = [name for name, value in variables.items() if value] + ["system"] * bool(
        system
    )
    if given and not example.is_conversation:
        raise InputError(
            f"{where}: field '{_field_of(given[0])}' is for the chat template, which"
            " renders messages, but the prompt is a string; write the prompt as"
            ' [{"role": "user", "content": ...}]'
        )
    prompt = example.prompt
    if system and not isinstance(prompt, str):
        prompt = _with_system(prompt, system, where)
    return prompt, variables


def for_template(record: Mapping) -> bool:
    """Whether a record has fields that only a chat template reads."""
    return any(record.get(x) for x in ("system", "tools", "chat_template_kwargs"))


def _variables(record: Mapping, where: str) -> dict[str, Any]:
    tools = _decoded(record.get("tools"), f"{where}: field 'tools'")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise InputError(
            f"{where}: field 'tools' must be a list of JSON schemas, but it is"
            f" {kind(tools)}"
        )
    place = f"{where}: field 'chat_template_kwargs'"
    options = _decoded(record.get("chat_template_kwargs"), place)
    if options is not None and not isinstance(options, dict):
        raise InputError(f"{place} must be an object, but it is {kind(options)}")
    options = {k: v for k, v in (options or {}).items() if v is not None}
    for name in options:
        if name in RESERVED:
            raise InputError(f"{place} may not set '{name}'; remove it")
    return options | ({"tools": tools} if tools else {})


def _system(record: Mapping, where: str) -> str:
    system = record.get("system")
    if system is None:
        return ""
    if not isinstance(system, str):
        raise InputError(
            f"{where}: field 'system' must be a string, but it is {kind(system)}"
        )
    return checked_text(system, f"{where}: field 'system'")


def _with_system(
    prompt: Sequence[Message], system: str, where: str
) -> tuple[Message, ...]:
    first = prompt[0]
    if first["role"] not in ("system", "developer"):
        return ({"role": "system", "content": system}, *prompt)
    if first["content"] == system:
        return tuple(prompt)
    raise InputError(
        f"{where}: field 'system' differs from the system message in the prompt; remove"
        " one of the two"
    )


def _decoded(value: Any, place: str) -> Any:
    """The value; decoded if it is JSON text, as columnar stores hold it."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error})") from None


def _field_of(name: str) -> str:
    return name if name in ("tools", "system") else "chat_template_kwargs"
