"""The records of an audited file: parsed to be judged, and written after the action."""

from collections.abc import Collection, Iterator
from typing import Any

from jaxpref.data import Source
from jaxpref.data.records import EMPTY, Example, Message, parse, text_of
from jaxpref.data.records.own_prompts import PROMPTS, has_own_prompts
from jaxpref.data.records.view import View
from jaxpref.errors import InputError


class RenamedSource:
    """A source whose records name the annotator in a configurable field.

    Its records lack the fields to ignore.
    """

    def __init__(self, source: Source, field: str, ignored: Collection[str] = ()):
        self._source, self._field, self._ignored = source, field, ignored

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        record = self._source[index]
        if not isinstance(record, dict):
            return record
        name = _value(record, self._field)
        if isinstance(name, bool) or not isinstance(name, str | int | None):
            raise InputError(
                f"{self.location(index)}: field {self._field!r} names the annotator; "
                f"it must be a string or an integer, but it is {name!r:.50}"
            )
        kept = {k: v for k, v in record.items() if k not in self._ignored}
        kept |= {"annotator": name}
        return record.with_fields(kept) if isinstance(record, View) else kept

    def original(self, index: int) -> Any:
        """The record as in the file, or rewritten in the names of `parse`."""
        return self._source[index]

    def location(self, index: int) -> str:
        """The file and row, for messages."""
        return self._source.location(index)


def named_annotators(
    source: Source, field: str | None, ignored: Collection[str] = ()
) -> RenamedSource:
    """Renames the annotator field; raises InputError if no record has it."""
    name = "annotator" if field is None else field
    if field is not None and not any(
        isinstance(record := source[n], dict) and _value(record, field) is not None
        for n in range(len(source))
    ):
        first = source[0]
        has = ", ".join(map(str, first)) if isinstance(first, dict) else "no fields"
        raise InputError(
            f"{source.location(0)} and all later rows: no field {field!r} to name the "
            f"annotator; the record has {has[:200]}; change --annotator-field"
        )
    return RenamedSource(source, name, ignored)


def source_names(
    source: RenamedSource, rows: Collection[int], field: str
) -> list[str | None]:
    """Where the pairs of these rows come from, by a field of their records."""
    found = []
    for row in rows:
        record = source.original(int(row))
        name = record.get(field) if isinstance(record, dict) else None
        known = isinstance(name, str | int) and not isinstance(name, bool)
        found.append(str(name) if known else None)
    return found


def example_at(source: Source, row: int) -> Example:
    """The pair of texts of a record that can be judged."""
    example = _parsed(source, row)
    assert isinstance(example, Example)  # malformed records were dropped before
    return example


def cleaned(source: RenamedSource, rows: list[dict[str, Any]]) -> Iterator[Any]:
    """The records of the file, in order, after the action of each row.

    A record of another format is written as a pair under our names; one for each vote,
    if it has several.  Records that were not judged are unchanged, except that those
    that training rejects are left out: malformed ones, those with an empty completion,
    and votes that are ties.
    """
    judged = {row["row"] - 1: row for row in rows}
    for index in range(len(source)):
        row = judged.get(index)
        if row is None and _is_rejected(source, index):
            continue
        record = source.original(index)
        if row is None or row["action"] == "keep":
            yield record
        elif row["action"] == "soft":
            p = row["p_correct"]
            yield record | {"p_correct": p, "flip_rate": 1 - p}
        elif row["action"] == "relabel":
            yield record | _exchanged(record)


def _is_rejected(source: RenamedSource, index: int) -> bool:
    """Whether a record that was not judged cannot be trained on either."""
    try:
        record = source[index]
        tied = isinstance(record, View) and bool(record.origin.reason)
        return tied or _parsed(source, index) == EMPTY
    except InputError:  # skipped, or the audit would have stopped
        return True


def _value(record: dict[str, Any], field: str) -> Any:
    """A field, also of the record in the file that this one was made from."""
    if record.get(field) is None and isinstance(record, View):
        return record.origin.record.get(field)
    return record.get(field)


def _exchanged(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record that change when its preference is reversed."""
    if "ranking" in record and "chosen" not in record:
        exchanged = {"ranking": record["ranking"][::-1]}
    else:
        exchanged = {"chosen": record["rejected"], "rejected": record["chosen"]}
        if has_own_prompts(record):
            one, two = PROMPTS.values()
            exchanged |= {one: record[two], two: record[one]}
        if isinstance(record.get("ended"), list):
            exchanged["ended"] = record["ended"][::-1]
    # Exchanging a known flip makes its label right.
    if isinstance(record.get("flip"), bool):
        exchanged["flip"] = not record["flip"]
    return exchanged


def texts_of(example: Example) -> dict[str, str]:
    """`prompt`, `chosen` and `rejected` of a pair, as plain text."""
    chosen, rejected = example.texts
    prompt = "\n\n".join(map(_prompt_text, example.prompts))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt_text(prompt: str | tuple[Message, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {text_of(turn)}" for turn in prompt)


def _parsed(source: Source, row: int) -> Example | str:
    # Whether pairs with two prompts are judged was decided when they were tokenized.
    return parse(
        source[row],
        source.location(row),
        sides=2,
        drop_empty=True,
        allow_own_prompts=True,
    )
