"""Which fields of the records are read, and which would change what a record means."""

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxpref.data.cells import from_cell
from jaxpref.data.records.view import Everything, View
from jaxpref.errors import InputError, closest

MEANINGFUL = frozenset(
    "label labels weight weights sample_weight sample_weights loss_weight mask"
    " desirable kto_tag preference preferred winner better votes flipped history input"
    " tools functions system system_prompt system_message chat_template"
    " chat_template_kwargs documents ended image images image_path video videos"
    " audio audios".split()
)
"""Fields that change what a record means: an error if nothing reads them."""


SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Names of the scores of `chosen` and `rejected`, also within `metadata`."""


class Record(Mapping[str, Any]):
    """A record that remembers which of its fields were read."""

    def __init__(self, fields: Mapping[str, Any], *, ignored: Collection[str] = ()):
        """Leaves out the fields in `ignored`."""
        self._fields = {k: v for k, v in fields.items() if k not in ignored}
        self.origin = fields.origin if isinstance(fields, View) else None
        self._given, self._ignored = frozenset(fields), ignored
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

    def peek(self, name: str) -> Any:
        """A field's value, without counting it as read; None if it is missing."""
        return self._fields.get(name)

    def everything(self) -> Mapping[str, Any]:
        """Its fields and, if it was made from another record, those of that record."""
        if self.origin is None:
            return self
        original = self.origin.record.items()
        return Everything(self, {k: v for k, v in original if k not in self._ignored})

    def used(self) -> set[str]:
        """The fields of the file that were read, as messages name them."""
        origin = self.origin
        if origin is None:
            return self.read
        return {origin.shown(x) for x in (self.read - origin.made) | origin.used}

    def has(self, name: str) -> bool:
        """Whether the record in the file has a field."""
        return name in self._given or (
            self.origin is not None and name in self.origin.record
        )

    def unread(self) -> list[str]:
        """The fields that are not empty and were not read."""
        empty = (None, "", [], {})
        hidden = set() if self.origin is None else self.origin.hidden()
        return [
            name
            for name, value in self._fields.items()
            if name not in self.read and name not in hidden and value not in empty
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
            if "weight" in name.lower():
                cure = f"read it with --columns weight={name}"
            raise InputError(
                f"{where}: field '{name}' changes what the record means, and this"
                f" command does not read it; {cure}, or pass --ignore-fields {name}"
            )


class FieldUse:
    """How many records had each field, by whether it was read, and each format."""

    def __init__(self) -> None:
        self._read: collections.Counter[str] = collections.Counter()
        self._unread: collections.Counter[str] = collections.Counter()
        self._ignored: collections.Counter[str] = collections.Counter()
        self._formats: collections.Counter[str] = collections.Counter()
        self._rendered: collections.Counter[str] = collections.Counter()
        self._contrary: collections.Counter[str] = collections.Counter()

    def add(
        self, record: Record, ignored: Collection[str], format: str, *, rendered: bool
    ) -> None:
        """Counts one record of a format; `rendered` if by the chat template."""
        self._rendered["messages" if rendered else "texts"] += 1
        self._read.update(sorted(record.used()))
        self._unread.update(record.unread())
        self._ignored.update(ignored)
        self._formats[format] += 1
        everything = record.everything()
        for fields in (everything, everything.get("metadata")):
            self._contrary.update(" ".join(names) for names in _contrary(fields))

    def warnings(self) -> list[str]:
        """A line for each two scores that contradict `chosen` and `rejected`."""
        return [
            f"warning: '{chosen}' is below '{rejected}' in {count:,} records; the label"
            " is nevertheless that 'chosen' is better"
            for names, count in self._contrary.items()
            for chosen, rejected in [names.split()]
        ]

    @property
    def _counters(self) -> tuple[collections.Counter[str], ...]:
        fields = self._read, self._unread, self._ignored
        return *fields, self._formats, self._rendered, self._contrary

    def counts(self) -> list[dict[str, int]]:
        """All counts, for `include`."""
        return [dict(counter) for counter in self._counters]

    def include(self, counts: Sequence[Mapping[str, int]]) -> None:
        """Adds the counts of other records, as `counts` returned them."""
        for own, others in zip(self._counters, counts, strict=True):
            own.update(others)

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
                fields = sorted({*self._read, *self._unread})
                raise InputError(
                    f"--ignore-fields {name}: no record has this field; the records"
                    f" have {', '.join(fields)[:200]}{closest(name, fields)}"
                )

    def check_mapped(self, names: Mapping[str, str]) -> None:
        """Refuses names in --fields that nothing reads, such as a misspelled one.

        Args:
          names: the field of the file by our name.

        Raises:
          InputError: names the field and those that are read.
        """
        read = {x.rpartition(" as ")[2] for x in self._read}
        for name, path in names.items():
            if self._unread[name] and name not in read:
                raise InputError(
                    f"--fields {name}={path}: nothing reads '{name}'; these are read:"
                    f" {', '.join(sorted(read))[:200]}{closest(name, sorted(read))}"
                )

    def check_rendered(self, variables: Collection[str], files: str) -> None:
        """Refuses variables of the chat template if no record is rendered by it.

        Args:
          variables: their names.
          files: what was read.

        Raises:
          InputError: names the files and the first variable.
        """
        if variables and not self._rendered["messages"]:
            raise InputError(
                f"{files}: no record has messages, so the chat template is not used;"
                f" leave out --template.{next(iter(variables))}"
            )

    def describe(self) -> str:
        """A line such as "fields read: a, prompt; not read: x; format: pairs 20"."""
        read = ", ".join(self._read) or "none"
        unread = [name for name in self._unread if name not in self._read]
        line = f"fields read: {read}"
        line += f"; not read: {', '.join(unread)[:300]}" if unread else ""
        ignored = ", ".join(self._ignored)
        line += f"; ignored on request: {ignored}" if ignored else ""
        formats = [f"{name} {n:,}" for name, n in self._formats.most_common()]
        return line + (f"; format: {', '.join(formats)}" if formats else "")


def _contrary(fields: Any) -> list[tuple[str, str]]:
    """The scores of a record by which the rejected answer is the better one."""
    found = []
    for names in SCORES if isinstance(fields, Mapping) else ():
        values = [from_cell(fields.get(name)) for name in names]
        numbers = all(isinstance(x, int | float) for x in values)
        if numbers and values[0] < values[1]:
            found.append(names)
    return found
