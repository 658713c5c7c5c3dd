"""The records of a source in the names that `records.parse` reads."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data.kinds import LABELED, LISTS, PAIRS, Kind
from jaxpref.data.record_options import RecordOptions
from jaxpref.data.records import Example, parse
from jaxpref.data.records.adapters import (
    ADAPTERS,
    AS_LISTS,
    SCORED_LISTS,
    SEVERAL,
    Adapter,
)
from jaxpref.data.records.fields import Record
from jaxpref.data.records.labeled import is_labeled
from jaxpref.data.records.lists import is_graded
from jaxpref.data.records.mapping import mapped
from jaxpref.data.records.view import Origin, Rewritten, View
from jaxpref.data.sources import (
    Divisible,
    ListSource,
    Source,
    divisible,
    open_source,
)
from jaxpref.errors import InputError
from jaxpref.runtime import heartbeat

OURS = ("chosen", "rejected", "completion", "completions", "messages")
"""Answers in our names: if `--fields` gives one, no format is looked for."""
COMPLETE = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion"),
    ("prompt", "completions"),
    ("conversations",),
    ("chosen_prompt",),
    ("rejected_prompt",),
)
"""Fields with which a record is in our names, whatever else it has."""
DEFAULTS = RecordOptions()
_BEAT = 10_000  # rows between two progress messages


def open_records(data: str, options: RecordOptions, *, sides: int | None) -> Source:
    """Opens preference data, in the names that `parse` reads.

    Args:
      data: see `open_source`.
      options: names of fields, format, and which pairs are made.
      sides: K, completions of a prompt; None for lists of any K.

    Raises:
      InputError: as `open_source`.
    """
    return RecordSource(open_source(data), options, sides=sides)


def first_kind(data: str, options: RecordOptions) -> Kind:
    """What the first record is in our names: a labeled answer, a list, or a pair.

    Records of other formats are pairs, apart from those in `AS_LISTS`.

    Args:
      data: see `open_source`.
      options: names of fields, and format.

    Raises:
      InputError: as `open_source`.
    """
    source = open_source(data)
    first = source[0] if len(source) else None
    if options.format is not None or not isinstance(first, Mapping):
        return LISTS if options.format == "lists" else PAIRS
    kept = {k: v for k, v in first.items() if k not in options.ignore_fields}
    if options.mapped:
        kept = mapped(kept, options.mapped, source.location(0))
    if is_graded(kept) or any(x.matches(kept) for x in AS_LISTS):
        return LISTS
    return LABELED if is_labeled(kept) else PAIRS


def examples_of(
    records: Sequence[Any], options: RecordOptions = DEFAULTS, *, sides: int = 2
) -> list[Example | str]:
    """What records in memory are read as.

    Args:
      records: decoded records.
      options: names of fields, format, and which pairs are made.
      sides: K, completions of a prompt; 2 for pairs, 1 for single completions.

    Returns:
      The example of each pair or completion, or the reason why it cannot be used.

    Raises:
      InputError: if a record is malformed.
    """
    source = RecordSource(ListSource(records), options, sides=sides)
    return [
        parse(
            source[n],
            source.location(n),
            sides=sides,
            ignore_fields=options.ignore_fields,
            allow_own_prompts=options.own_prompts,
        )
        for n in range(len(source))
    ]


class RecordSource(Divisible):
    """A source of records under our names; see `view.View`.

    A record in the file may stand for several: one for each vote, or for each pair of
    scored answers.  If the first record may, all are read once to count them.  Records
    that are in our names already are unchanged.
    """

    def __init__(self, source: Source, options: RecordOptions, *, sides: int | None):
        self._source, self._options = divisible(source), options
        self._mapped, self._rules = options.mapped, options.rules(sides)
        self._sides = sides
        self._last: tuple[int, list[Any]] = (-1, [])
        self._several = self._stands_for_several()

    @functools.cached_property
    def _ends(self) -> np.ndarray | None:
        """Records up to and including each row; None if each stands for one."""
        if not self._several:
            return None
        return np.cumsum([self._count(row) for row in range(self.num_rows)])

    def __len__(self) -> int:
        return self.num_rows if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        row, part = self._place(index)
        return self._checked(row)[part]

    def location(self, index: int) -> str:
        """The file and its row and, if a record stands for several, which of them."""
        row, part = self._place(index)
        where = self._source.location(row)
        if self._ends is None or self._count(row) == 1:
            return where
        return f"{where} {self._views(row)[part].origin.part}".rstrip()

    @property
    def num_rows(self) -> int:
        """See `Divisible`."""
        return self._source.num_rows

    def row_location(self, row: int) -> str:
        """See `Divisible`."""
        return self._source.row_location(row)

    def records(self, row: int) -> list[tuple[str, str, Any]]:
        """See `Divisible`."""
        views, where = self._checked(row), self.row_location(row)
        if len(views) == 1:
            return [("", where, views[0])]
        parts = [view.origin.part for view in views]
        places = [f"{where} {part}".rstrip() for part in parts]
        return list(zip(parts, places, views))

    def part(self, start: int, stop: int) -> "RecordSource":
        """See `Divisible`."""
        own = copy.copy(self)
        own.__dict__.pop("_ends", None)
        own._source, own._last = self._source.part(start, stop), (-1, [])
        return own

    def content(self, start: int, stop: int) -> bytes | None:
        """See `Divisible`."""
        found = self._source.content(start, stop)
        about = f"{self._options.changed()} {self._rules} {self._several}"
        return found and found + about.encode()

    def _checked(self, row: int) -> list[Any]:
        """The records of a row; raises InputError for several where one is expected."""
        views = self._views(row)
        if not self._several and len(views) > 1:
            raise InputError(
                f"{self._source.location(row)}: the record gives {len(views)}"
                " pairs, but the first one of the file is of another format; put them"
                f" into files of their own, or pass --format {views[0].origin.format}"
            )
        return views

    def row(self, index: int) -> int:
        """The row of the source in which the record is, from 0."""
        return self._place(index)[0]

    def _place(self, index: int) -> tuple[int, int]:
        """The row of the source, and the number of the record among those it is."""
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)

    def _stands_for_several(self) -> bool:
        """Whether the first record may stand for several."""
        adapter = self._options.adapter
        if self._options.format is None and len(self._source):
            try:
                first = self._source[0]
                if isinstance(first, dict):
                    adapter = self._adapter(self._renamed(first, "row 1"))
            except InputError:  # reported when the record is read
                return False
        return adapter is not None and adapter.several(self._rules)

    def _count(self, row: int) -> int:
        """How many records a row stands for; 1 if it is malformed."""
        if row % _BEAT == 0:
            heartbeat.beat(f"counting {self._source.location(row)}")
        try:
            return len(self._views(row))
        except InputError:  # reported when the record is read
            return 1

    def _views(self, row: int) -> list[Any]:
        if self._last[0] != row:
            found = self._read(self._source[row], self._source.location(row))
            self._last = row, found
        return self._last[1]

    def _read(self, record: Any, where: str) -> list[Any]:
        """The records that one in the file stands for."""
        if not isinstance(record, dict):
            return [record]
        fields = self._renamed(record, where)
        adapter = self._adapter(fields)
        native = self._options.format if adapter is None else None
        if adapter is None:
            if not self._mapped and native is None:
                return [record]
            origin = Origin(record, self._mapped, native or "", native is not None)
            return [View(fields, origin)]
        tracked = Record(fields)
        try:
            found = adapter.rewrite(tracked, where, self._rules)
            rest = {k: tracked.peek(k) for k in tracked if k not in tracked.read}
            _check_ended(rest, where)
        except InputError as error:
            raise Origin(record, self._mapped, adapter.name).explained(error) from None
        used = frozenset(tracked.read)
        return [self._view(record, rest, one, adapter, used) for one in found]

    def _view(
        self,
        record: Mapping[str, Any],
        rest: Mapping[str, Any],
        one: Rewritten,
        adapter: Adapter,
        used: frozenset[str],
    ) -> View:
        origin = Origin(
            record,
            self._mapped,
            adapter.name,
            names=one.names,
            made=frozenset(one.fields),
            used=used,
            reason=one.reason,
            part=one.part,
        )
        return View({**rest, **one.fields}, origin)

    def _renamed(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The record with the names of `--fields`, without fields to ignore."""
        ignored = self._options.ignore_fields
        kept = {k: v for k, v in record.items() if k not in ignored}
        return mapped(kept, self._mapped, where) if self._mapped else kept

    def _adapter(self, fields: Mapping[str, Any]) -> Adapter | None:
        """The adapter of a record; None if it is in our names."""
        if self._options.format is not None:
            return self._options.adapter
        if self._sides is not None and is_graded(fields):
            return SCORED_LISTS
        if SEVERAL.matches(fields):  # else they would look like pairs in our names
            return SEVERAL
        if any(name in self._mapped for name in OURS):
            return None
        if any(all(x in fields for x in names) for names in COMPLETE):
            return None
        return next((x for x in ADAPTERS if x.matches(fields)), None)


def _check_ended(rest: Mapping[str, Any], where: str) -> None:
    """Refuses `ended` for each answer, whose order would not be known."""
    if isinstance(rest.get("ended"), list):
        raise InputError(
            f"{where}: field 'ended' is a list, whose order is not known in this"
            " format; write the answers as 'chosen' and 'rejected'"
        )
