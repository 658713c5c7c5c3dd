"""Which fields of the records are read, and which would change what a record means."""

import collections
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxpref.errors import InputError

MEANINGFUL = frozenset(
    "label labels weight weights sample_weight sample_weights loss_weight mask"
    " desirable preference winner better flipped history input tools functions system"
    " system_prompt system_message chat_template chat_template_kwargs documents ended"
    " image images image_path video videos audio audios".split()
)
"""Fields that change what a record means: an error if nothing reads them."""


class Record(Mapping[str, Any]):
    """A record that remembers which of its fields were read."""

    def __init__(self, fields: Mapping[str, Any], *, ignored: Collection[str] = ()):
        """Leaves out the fields in `ignored`."""
        self._fields = {k: v for k, v in fields.items() if k not in ignored}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def unread(self) -> list[str]:
        """The fields that are not empty and were not read."""
        empty = (None, "", [], {})
        return [
            name
            for name, value in self._fields.items()
            if name not in self.read and value not in empty
        ]


def check_unread(record: Record, where: str) -> None:
    """Refuses a record whose meaning depends on a field that was not read.

    Raises:
      InputError: names the field.
    """
    for name in record.unread():
        if name.lower() in MEANINGFUL:
            cure = "remove the row or the field"
            if name.lower() in ("label", "labels"):
                cure = "keep only the rows to train on, without it"
            raise InputError(
                f"{where}: field '{name}' changes what the record means, and this"
                f" command does not read it; {cure}, or pass --ignore-fields {name}"
            )


class FieldUse:
    """How many records had each field, by whether it was read."""

    def __init__(self) -> None:
        self._read: collections.Counter[str] = collections.Counter()
        self._unread: collections.Counter[str] = collections.Counter()
        self._ignored: collections.Counter[str] = collections.Counter()

    def add(self, record: Record, ignored: Collection[str]) -> None:
        """Counts the fields of one record."""
        self._read.update(sorted(record.read))
        self._unread.update(record.unread())
        self._ignored.update(ignored)

    def read_too(self, name: str) -> None:
        """Counts a field as read, because the command itself reads it."""
        if name in self._unread:
            self._read[name] += self._unread.pop(name)

    def check_ignored(self, names: Collection[str]) -> None:
        """Refuses names in --ignore-fields that no record has.

        Raises:
          InputError: names the field and those that exist.
        """
        for name in names:
            if not self._ignored[name]:
                fields = ", ".join(sorted({*self._read, *self._unread}))
                raise InputError(
                    f"--ignore-fields {name}: no record has this field; the records"
                    f" have {fields[:200]}"
                )

    def describe(self) -> str:
        """A line such as "fields read: prompt, chosen, rejected; not read: source"."""
        read = ", ".join(self._read) or "none"
        unread = [name for name in self._unread if name not in self._read]
        line = f"fields read: {read}"
        line += f"; not read: {', '.join(unread)[:300]}" if unread else ""
        ignored = ", ".join(self._ignored)
        return line + (f"; ignored on request: {ignored}" if ignored else "")
