"""`--config FILE` and `--print-config`: options in YAML, under their usual names.

    model: HuggingFaceTB/SmolLM2-135M
    batch-size: 64
    loss:
      name: rdpo
      flip-rate: 0.2

A namespace is a mapping or a prefix: `loss.flip-rate: 0.2`.  `name` in `loss`,
`correct` and `objective` is the value of the option itself.
"""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.cli.options import Option, Parts
from jaxpref.cli.words import Given, canonical
from jaxpref.errors import InputError, visible
from jaxpref.files import check_regular

NAMED = ("loss", "correct", "objective", "objective.noise")
"""Options whose values are names, and which are namespaces too."""
DEEPEST = 3
"""The most namespaces before an option's name."""
EITHER = (
    ("max-steps", "epochs"),
    ("heldout-fraction", "eval-data"),
    ("prompts", "data"),
)
"""Options that replace each other."""


def read(path: str) -> Given:
    """The options in a file.

    Raises:
      InputError: if the file cannot be read, is not YAML, or repeats an option.
    """
    import yaml

    check_regular(path)
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"--config {path}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected lines of `option: value`")
    given: Given = {}
    for name, value in _flat(content, ""):
        items = value if isinstance(value, list) else [value]
        if name.count(".") > DEEPEST or any(isinstance(x, list | dict) for x in items):
            raise InputError(
                f"--config {path}: {name[:100]} is nested too deeply; write "
                "`option: value`"
            )
        words = words_of(name, value)
        for option in words:
            if option in given:
                raise InputError(f"--config {path}: {option} is given twice")
        given |= words
    return given


def overridden(file: Given, typed: Given) -> Given:
    """The options of a file, overridden by those on the command line.

    If the command line names another loss or objective, the file's options for the
    replaced one are dropped.
    """
    dropped = {name.removeprefix("no-") for name in typed}
    for first, second in EITHER:
        dropped |= {second} if first in typed else set()
        dropped |= {first} if second in typed else set()
    kept = {
        name: words
        for name, words in file.items()
        if name not in typed and name.removeprefix("no-") not in dropped
    }
    for name in NAMED:
        if name in typed and typed[name] != file.get(name):
            kept = {n: w for n, w in kept.items() if not n.startswith(f"{name}.")}
    return kept | typed


def write(options: Mapping[str, Option], values: Mapping[str, Any]) -> str:
    """All options as YAML, nested by namespace; `read` reads it back.

    Args:
      options: the command's options, by name.
      values: their values, and those of the options in `NAMED` that are set.
    """
    import yaml

    nested: dict[str, Any] = {}
    for name in [*(n for n in NAMED if n in values), *options]:
        *spaces, last = f"{name}.name".split(".") if name in NAMED else name.split(".")
        inside = nested
        for space in spaces:
            inside = inside.setdefault(space, {})
        inside[last] = _plain(values[name])
    text = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)
    if visible(text) != text:  # YAML's own escapes can be read back
        text = yaml.safe_dump(nested, sort_keys=False)
    return text


def _flat(content: Mapping, prefix: str):
    """Yields (option name, value) for everything in nested mappings."""
    for key, value in content.items():
        name = canonical(f"{prefix}.{key}" if prefix else str(key))
        if isinstance(value, dict) and name.count(".") <= DEEPEST:
            yield from _flat(value, name)
        elif prefix in NAMED and key == "name":
            yield prefix, value
        else:
            yield name, value


def words_of(name: str, value: Any) -> Given:
    """An option as on the command line."""
    if value is True:
        return {name: []}
    if value is False:
        return {f"no-{name}": []}
    if isinstance(value, list):
        return {name: [str(item) for item in value]}
    return {name: [str(value)]}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def values_of(parts: Parts, parsed: Any) -> dict[str, Any]:
    """Option name -> value, from an object with a field for each part."""
    found: dict[str, Any] = {}
    for field, part in parts.items():
        found |= _values(getattr(parsed, field), part.prefix)
    return found


def _values(instance: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, value in vars(instance).items():
        name = canonical(f"{prefix}.{field}" if prefix else field)
        if hasattr(value, "__dataclass_fields__"):
            found |= _values(value, name)
        else:
            found[name] = value
    return found
