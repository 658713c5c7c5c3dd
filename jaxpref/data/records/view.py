"""Records of other formats, seen under the names that `parse` reads."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A record in the names that `parse` reads, as an adapter writes it."""

    fields: Mapping[str, Any]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The field in the file, by our name, for messages."""
    reason: str = ""
    """Why the record cannot be used, such as a tie; empty if it can."""
    part: str = ""
    """Which part of the record in the file it is, for messages: "vote 2"."""


class View(dict[str, Any]):
    """A record in the names that `parse` reads, made from a record in other names.

    It has the fields that an adapter or `--fields` made, and under their own names all
    others that were not read for them.
    """

    def __init__(self, fields: Mapping[str, Any], origin: "Origin"):
        super().__init__(fields)
        self.origin = origin

    def with_fields(self, fields: Mapping[str, Any]) -> "View":
        """The same view with other fields."""
        return View(fields, self.origin)

    def usable(self) -> "View":
        """The same view without the reason why it cannot be used."""
        return View(self, dataclasses.replace(self.origin, reason=""))


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the fields of a view come from."""

    record: Mapping[str, Any]
    """The record in the file, where numbers for losses are also found."""
    mapped: Mapping[str, str]
    """The path in the file by our name, from `--fields`."""
    format: str = ""
    """The format of the record in the file; empty to detect one of `parse`."""
    native: bool = False
    """Whether that is a format of `parse`."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The field that an adapter read, by our name."""
    made: frozenset[str] = frozenset()
    """Fields that an adapter made."""
    used: frozenset[str] = frozenset()
    """Fields that it read for them."""
    reason: str = ""
    """Why the record cannot be used; empty if it can."""
    part: str = ""
    """Which part of the record in the file it is, for messages: "vote 2"."""

    def shown(self, name: str) -> str:
        """How messages name a field: "a as chosen" if `--fields` renamed it."""
        own = self.mapped.get(name, name)
        return name if own == name else f"{own} as {name}"

    def hidden(self) -> set[str]:
        """Fields of which parts were read by dotted paths."""
        return {x.partition(".")[0] for x in self.mapped.values() if "." in x}

    def explained(self, error: InputError) -> InputError:
        """The error, with the names in the file of the fields that it mentions."""
        text, notes = str(error), []
        for name in dict.fromkeys([*self.names, *self.mapped]):
            field = self.names.get(name, name)
            own = self.mapped.get(field, field)
            if own != name and f"'{name}'" in text:
                notes.append(f"'{name}' is read from '{own}'")
        if self.format:
            notes.append(f"read as --format {self.format}")
        return InputError("; ".join([text, *notes]))


class Everything(Mapping[str, Any]):
    """The fields of a record and, behind them, those of the record in the file."""

    def __init__(self, first: Mapping[str, Any], behind: Mapping[str, Any]):
        self._first, self._behind = first, behind

    def __getitem__(self, name: str) -> Any:
        return self._first[name] if name in self._first else self._behind[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from (name for name in self._behind if name not in self._first)

    def __len__(self) -> int:
        return len({*self._first, *self._behind})
