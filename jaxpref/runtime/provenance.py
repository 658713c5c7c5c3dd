"""What a checkpoint was made with: options and digests of files, by name."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a file or folder; its location does not matter."""

    digest: str
    """SHA-256 (hex), or any other text that differs if the content does."""
    path: str = dataclasses.field(compare=False)
    """Where it was read, for messages."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Everything that decides what a run computes, except software and devices."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options that affect the results, as JSON values by name; see `flat`."""
    contents: Mapping[str, Content] = dataclasses.field(default_factory=dict)
    """Files and folders by name, for example "the weights of the model"."""


NOTHING = Provenance()
"""Provenance of a state that does not come from options and files."""


def differences(made: Provenance, now: Provenance) -> list[str]:
    """What differs, by name; empty if nothing does.

    Args:
      made: what something on disk was made with.
      now: what this run has.
    """
    found = changed_options(made.options, now.options)
    for name in sorted(made.contents.keys() | now.contents.keys()):
        before, after = made.contents.get(name), now.contents.get(name)
        if before == after:
            continue
        if before is None or after is None:
            found.append(f"{name} ({'added' if before is None else 'removed'})")
        elif before.path == after.path:
            found.append(f"{name} ({after.path} has changed)")
        else:
            found.append(f"{name} ({before.path} -> {after.path})")
    return found


def changed_options(
    before: Mapping[str, Any], after: Mapping[str, Any], *, but: Collection[str] = ()
) -> list[str]:
    """The options that differ, with both values, except those in `but`."""
    return [
        f"{name} ({before.get(name)!r} -> {after.get(name)!r})"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not _is_part(name, but)
    ]


def flat(options: Mapping[str, Any], *, but: Collection[str] = ()) -> dict[str, Any]:
    """Nested options by dotted name, `optimizer.learning_rate`, except those in `but`.

    A name in `but` stands for everything below it too.
    """
    found = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            inner = flat(value)
            found |= {f"{name}.{part}": x for part, x in inner.items()}
        else:
            found[name] = value
    return {name: x for name, x in found.items() if not _is_part(name, but)}


def to_json(provenance: Provenance) -> dict[str, Any]:
    """The provenance as JSON would decode it."""
    return json.loads(json.dumps(dataclasses.asdict(provenance)))


def from_json(stored: Any) -> Provenance:
    """The provenance from what `to_json` returned.

    Raises:
      ValueError: if it is something else.
    """
    try:
        contents = {name: Content(**x) for name, x in stored["contents"].items()}
        return Provenance(dict(stored["options"]), contents)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError("not the provenance of a checkpoint") from error


def _is_part(name: str, names: Collection[str]) -> bool:
    """Whether an option or one of the objects around it is in `names`."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))
