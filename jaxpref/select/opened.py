"""The records to choose from, and what is read of them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxpref.data import open_source
from jaxpref.data.bad_rows import BadRows
from jaxpref.data.cells import from_cell
from jaxpref.data.columns import LARGEST, field_value
from jaxpref.data.kinds import KINDS, Kind
from jaxpref.data.record_source import RecordSource
from jaxpref.data.records import IDENTICAL, Example, FieldUse, parse
from jaxpref.data.records.example import text_of
from jaxpref.data.records.view import Everything, View
from jaxpref.data.sources import Source
from jaxpref.data.sources.source import Joined
from jaxpref.errors import InputError, visible
from jaxpref.select.config import SelectConfig

NO_VALUE = "no value in the field"


class Read(NamedTuple):
    """A pair, answer or list of a file."""

    row: int
    """The row of its record in the file, from 0."""
    index: int
    """Its number in `Opened.records`, of which a row may have several."""
    example: Example | str
    """What is read, or why nothing can be."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """Opened data."""

    config: SelectConfig
    file: Source
    """The records as in the file, or in all files one after the other."""
    sizes: dict[str, int]
    """Records of each file, by its name."""
    records: RecordSource
    """The pairs, answers or lists in them."""
    kind: Kind
    """What is read of each."""
    bad: BadRows
    """Malformed rows."""
    fields: FieldUse = dataclasses.field(default_factory=FieldUse)
    """Which fields were read."""

    def examples(self, title: str) -> Iterator[Read]:
        """All pairs, answers or lists, with a progress bar.

        Raises:
          InputError: if a record is malformed and not skipped, or an option names a
            field that no record has.
        """
        rows = range(len(self.records))
        for index in tqdm(rows, desc=visible(title), unit="record", disable=None):
            place = self.records.location(index)
            found = self.bad.attempt(lambda n=index: self._example(n), place)
            example = "malformed" if found is None else found
            yield Read(self.records.row(index), index, example)
        if self.config.on_bad_row == "raise":
            self.fields.check_ignored(self.config.ignore_fields)
        self.fields.check_mapped(self.config.mapped)

    def reason(self, index: int) -> str:
        """Why a pair, answer or list that can be parsed cannot be used."""
        example = self._example(index)
        return example if isinstance(example, str) else "cannot be read by the model"

    def _example(self, index: int) -> Example | str:
        record, place = self.records[index], self.records.location(index)
        kind = self.kind.of_record(record)
        example = parse(
            record,
            place,
            sides=kind.sides,
            drop_empty=True,
            columns=kind.columns({}),
            ignore_fields=self.config.ignore_fields,
            fields=self.fields,
        )
        if not isinstance(example, str) and example.is_identical:
            return IDENTICAL
        return example

    def number(self, index: int, field: str, flag: str) -> float | None:
        """The number in a field of a record; None if it has no value.

        Raises:
          InputError: if the value is not a finite number; `flag` is the option that
            names the field.
        """
        record = self.records[index]
        if isinstance(record, View):
            record = Everything(record, record.origin.record)
        value = field_value(record, field) if isinstance(record, Mapping) else None
        return _number(from_cell(value), self.records.location(index), field, flag)


def open_file(config: SelectConfig) -> Opened:
    """Opens the data of a config."""
    parts, kind = [open_source(name) for name in config.files], KINDS[config.kind]
    sizes = dict(zip(config.files, map(len, parts), strict=True))
    file = parts[0] if len(parts) == 1 else Joined(parts)
    records = RecordSource(file, config, sides=kind.sides)
    return Opened(config, file, sizes, records, kind, BadRows(config.on_bad_row))


def prompt_text(example: Example) -> str:
    """The prompt as text; of messages, what they say."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(text_of(turn) for turn in example.prompt)


def _number(value: Any, where: str, field: str, flag: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not abs(value) <= LARGEST:
        raise InputError(
            f"{where}: field '{field}' must be a finite number, but it is"
            f" {value!r:.50}; correct it or change {flag}"
        )
    return float(value)
