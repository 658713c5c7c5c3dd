"""`--fields` and `--columns`: fields of the records by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.errors import InputError, closest


def read_fields(words: Sequence[str], flag: str, example: str) -> dict[str, str]:
    """The field of the file by our name, from words such as "prompt=question,chosen=a".

    Args:
      words: the values of the option.
      flag: the option, for messages.
      example: an example of its value.

    Raises:
      InputError: if a word has no "=", or names a field twice.
    """
    found: dict[str, str] = {}
    for word in ",".join(words).split(","):
        if not word.strip() and found:
            continue  # a comma between two words
        name, equals, path = (x.strip() for x in word.partition("="))
        if not (name and equals and path):
            raise InputError(f"{flag} {word}: expected NAME=FIELD, such as {example}")
        if name in found:
            raise InputError(f"{flag} {word}: '{name}' is given twice; keep one")
        found[name] = path
    return found


def mapped(
    record: Mapping[str, Any], fields: Mapping[str, str], where: str
) -> dict[str, Any]:
    """The record with its fields under our names; all others keep theirs.

    A field read as a whole is renamed.  One that is read in part, by a dotted path,
    also keeps its name.

    Args:
      record: the record in the file.
      fields: the path of each field by our name.  It is a field's name, or `a.0.b`:
        field b of the first item of field a.
      where: "file row n", for errors.

    Raises:
      InputError: if a path leads nowhere; names those that exist.
    """
    found = {name: value_at(record, path, name, where) for name, path in fields.items()}
    renamed = set(fields.values())
    return {k: v for k, v in record.items() if k not in renamed} | found


def value_at(record: Mapping[str, Any], path: str, name: str, where: str) -> Any:
    """The value at a path, which is a field's name or dotted.

    Raises:
      InputError: if there is none.
    """
    if path in record:
        return record[path]
    value: Any = record
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if isinstance(value, list) and part.lstrip("-").isdigit():
            if -len(value) <= int(part) < len(value):
                value = value[int(part)]
                continue
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
            continue
        before = ".".join(parts[:depth])
        raise InputError(
            f"{where}: no field '{path}' for --fields {name}={path};"
            f" {_contents(value, before)}{_near(value, part)}"
        )
    return value


def _contents(value: Any, path: str) -> str:
    """What the value has instead of a missing part."""
    what = f"'{path}'" if path else "the record"
    if isinstance(value, Mapping):
        return f"{what} has {', '.join(map(str, value))[:200] or 'no fields'}"
    if isinstance(value, list):
        return f"{what} is a list of {len(value)}, counted from 0"
    return f"{what} is a {type(value).__name__} and has no fields"


def _near(value: Any, part: str) -> str:
    return closest(part, map(str, value)) if isinstance(value, Mapping) else ""
