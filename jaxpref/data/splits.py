"""From a source to training and held-out data: read, tokenize, drop, split, flip."""

import collections
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxpref.data.bad_rows import BadRow, BadRows
from jaxpref.data.dataset import DatasetBuilder, PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.inject import Noise, fields_read, read_noise
from jaxpref.data.kinds import PAIRS, Kind
from jaxpref.data.labels import exchanged
from jaxpref.data.mismatched import with_mismatched
from jaxpref.data.options import DEFAULTS, DataOptions
from jaxpref.data.records import (
    IDENTICAL,
    Example,
    FieldUse,
    expand,
    parse,
)
from jaxpref.data.records.labeled import answers_of
from jaxpref.data.records.lists import with_labels
from jaxpref.data.shared_prompts import prompt_hash, split_key
from jaxpref.data.sources import Source
from jaxpref.data.tokenize import Tokens, tokenize
from jaxpref.errors import InputError
from jaxpref.runtime import heartbeat

_CHUNK_ROWS = 1024
_CHUNK_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of a run, and counts of what was left out."""

    train: PreferenceDataset
    """Training data, with injected noise in the labels."""
    heldout: PreferenceDataset
    """Held-out data, with labels as in the file."""
    report: dict[str, int]
    """Counts: rows read, kept, dropped (by reason), cut and flipped."""
    digest: str
    """SHA-256 (hex) of both.  Equal only if tokens, labels, known flips, annotator
    indices, empty traces and order are equal."""
    fields: FieldUse = dataclasses.field(default_factory=FieldUse)
    """Which fields of the records were read."""
    kind: Kind = PAIRS
    """What was read of each record."""
    skipped: tuple[BadRow, ...] = ()
    """Malformed rows that were skipped."""
    weights: tuple[float, ...] | None = None
    """The share of each source in the training pairs of an epoch; see `weighted`."""

    def describe(self) -> str:
        """The report in one line, without zero counts."""
        return ", ".join(
            f"{name} {count}" for name, count in self.report.items() if count
        )


def make_splits(
    source: Source,
    tokenizer: Any,
    options: DataOptions = DEFAULTS,
    *,
    kind: Kind = PAIRS,
    whole_turns: bool = False,
    more: Sequence[Source] = (),
) -> Splits:
    """Turns sources into tokenized, split and optionally flipped pairs.

    A pair's id is the hash of its content before flipping plus its occurrence, so the
    third copy of a row ends in "-2".  Splits depend on the hash of the prompt and flips
    on the hash of the id, and not on the order of rows or on other rows.

    A record with several traces becomes one pair per trace, each with its own id.  The
    record's label is flipped in all of its pairs or in none.  Held-out labels are never
    flipped.  `is_flipped` is true if the label is known to be wrong, from the file or
    from injected noise; a label flipped by both is right again.

    Args:
      source: from `open_source`, or any sequence of records with `location`.
      tokenizer: from `load_tokenizer`.
      options: lengths, split, noise.
      kind: what is read of each record.
      whole_turns: whether turns end as a reward model reads them; see `tokenize`.
      more: further sources, numbered from 1 in the column `source`.

    Raises:
      InputError: if a record is malformed, or none is left.
    """
    to_pairs = _labeled if "desirable" in kind.labels else _unchanged
    parts = [(x, to_pairs) for x in (source, *more)]
    return _make_splits(parts, tokenizer, options, kind, whole_turns)


def make_mixed_splits(
    source: Source,
    tokenizer: Any,
    options: DataOptions = DEFAULTS,
    *,
    empty: Source | None = None,
) -> Splits:
    """The splits of a run that mixes pairs with traces and pairs with an empty trace.

    Both kinds are in one dataset, distinguished by the column `empty_trace`.  This is
    `make_splits`, except that every pair without a trace is given an empty one.  If
    `empty` is None, every record with traces is also used a second time, with its
    answers alone.

    Args:
      source: records with traces; any others are given an empty trace.
      tokenizer: from `load_tokenizer`.
      options: lengths, split, noise and markers, for both sources.
      empty: records without traces, generated with thinking switched off.

    Raises:
      InputError: as for `make_splits`, or if there are no pairs of one kind.
    """
    parts = [(source, _with_empty_too if empty is None else _with_empty)]
    if empty is not None:
        parts += [(empty, _only_empty)]
    splits = _make_splits(parts, tokenizer, options, PAIRS)
    is_empty = np.concatenate(
        [part.columns["empty_trace"] for part in (splits.train, splits.heldout)]
    )
    counts = {
        "with a trace": int((~is_empty).sum()),
        "with an empty trace": int(is_empty.sum()),
    }
    splits = dataclasses.replace(splits, report=splits.report | counts)
    for kind, where, cure in (
        ("with a trace", source, "write the sides as {trace, answer}"),
        ("with an empty trace", empty or source, "their answers must differ"),
    ):
        if not counts[kind]:
            raise InputError(
                f"{where.location(0)} and all after it: no pair {kind} is left"
                f" ({splits.describe()}); {cure}"
            )
    return splits


ToPairs = Callable[[Example, str], list[Example]]
"""`(record, place) -> pairs`: the pairs made from a record."""


def _unchanged(example: Example, place: str) -> list[Example]:
    return expand(example)


def _labeled(example: Example, place: str) -> list[Example]:
    return [x for answer in answers_of(example) for x in expand(answer)]


def _with_empty(example: Example, place: str) -> list[Example]:
    return expand(example) if example.traces else _only_empty(example, place)


def _with_empty_too(example: Example, place: str) -> list[Example]:
    empty = dataclasses.replace(example, traces=(), empty=True)
    return [*expand(example), empty] if example.traces else [empty]


def _only_empty(example: Example, place: str) -> list[Example]:
    if example.traces:
        raise InputError(
            f"{place}: field 'trace' occurs in data without traces; remove it, or use"
            " the file as the data with traces"
        )
    return [dataclasses.replace(example, empty=True)]


def _make_splits(
    parts: Sequence[tuple[Source, ToPairs]],
    tokenizer: Any,
    options: DataOptions,
    kind: Kind,
    whole_turns: bool = False,
) -> Splits:
    noise = read_noise(options.inject)
    noise.check_kind(kind)
    counts = collections.Counter()
    train, heldout = DatasetBuilder(kind.sides), DatasetBuilder(kind.sides)
    fields, bad = FieldUse(), BadRows(options.on_bad_row)
    pairs = _read(parts, tokenizer, options, kind, counts, fields, bad, whole_turns)
    for pair in pairs:
        _add(train, heldout, pair, options, noise, counts)
    place = f"{parts[0][0].location(0)} and all after it"
    counts.update(train=len(train), heldout=len(heldout), skipped=len(bad.found))
    if not len(train) + len(heldout):
        dropped = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n)
        dropped += f"; the first: {bad.found[0].reason}" if bad.found else ""
        raise InputError(f"{place}: no record is left ({dropped})")
    noise.check_used(place)
    names = sorted(train.annotators() | heldout.annotators())
    most = max(train.most_completions, heldout.most_completions)
    datasets = train.build(names, most), heldout.build(names, most)
    if kind.mismatched:
        add = functools.partial(
            with_mismatched, max_length=options.longest, place=place
        )
        datasets = add(datasets[0]), add(datasets[1], others=datasets[0])
    digest = hashlib.sha256("".join(x.digest() for x in datasets).encode()).hexdigest()
    return Splits(
        *datasets,
        report=dict(counts),
        digest=digest,
        fields=fields,
        kind=kind,
        skipped=tuple(bad.found),
    )


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One pair before it is tokenized."""

    source: int
    """Index of its source."""
    row: int
    place: str
    """"file row n", for errors."""
    record_id: str
    """The id of the whole record."""
    example: Example


@dataclasses.dataclass(frozen=True)
class _TokenizedPair(_Pair):
    id: str
    tokens: Tokens


def _read(
    parts: Sequence[tuple[Source, ToPairs]],
    tokenizer: Any,
    options: DataOptions,
    kind: Kind,
    counts: collections.Counter,
    fields: FieldUse,
    bad: BadRows,
    whole_turns: bool,
) -> Iterator[_TokenizedPair]:
    """Tokenized pairs of whole records, about `max_pairs` from each source."""
    copies: collections.Counter[str] = collections.Counter()
    records: collections.Counter[str] = collections.Counter()
    limit = sys.maxsize if options.max_pairs is None else options.max_pairs
    for number, (source, to_pairs) in enumerate(parts):
        count, last = 0, -1
        chunks = _chunks(
            number, source, to_pairs, options, kind, counts, records, fields, bad
        )
        for pairs in chunks:
            heartbeat.beat(f"reading {pairs[-1].place}")
            places = [pair.place for pair in pairs]
            results = bad.together(
                lambda some, pairs=pairs: tokenize(
                    [pairs[n].example for n in some],
                    [pairs[n].place for n in some],
                    tokenizer,
                    max_length=options.longest,
                    max_prompt_length=options.max_prompt_length,
                    markers=options.markers,
                    whole_turns=whole_turns,
                ),
                places,
            )
            for pair, result in zip(pairs, results):
                if result is None:
                    continue
                if isinstance(result, str):
                    counts[f"dropped: {result}"] += 1
                elif count < limit or pair.row == last:
                    name = _unique_id(pair.example, copies)
                    yield _TokenizedPair(**vars(pair), id=name, tokens=result)
                    count, last = count + 1, pair.row
            if count >= limit:
                break


def _add(
    train: DatasetBuilder,
    heldout: DatasetBuilder,
    pair: _TokenizedPair,
    options: DataOptions,
    noise: Noise,
    counts: collections.Counter,
) -> None:
    """Decides the split and label of a pair, and stores it."""
    example, tokens = pair.example, pair.tokens
    (u,) = hash_uniforms([split_key(example.prompt)], salt="heldout")
    hold = u < options.heldout_share
    annotator, flip = example.annotator, False
    if options.inject.active and not hold:
        annotator, flip = noise.label(example, pair.record_id, pair.place)
    counts["prompts cut"] += tokens.prompt_cut
    counts["completions cut"] += tokens.completions_cut
    counts["traces cut"] += tokens.traces_cut
    counts["prompts without earlier turns"] += tokens.turns_dropped
    counts["flipped"] += flip
    counts["flips in the file"] += example.flip
    columns = {
        "is_flipped": example.flip != flip,
        "row": pair.row,
        "source": pair.source,
        "empty_trace": example.empty,
        "prompt": prompt_hash(example.prompt),
    }
    (heldout if hold else train).add(
        tokens.prompt,
        tokens.completions[::-1] if flip else tokens.completions,
        id=pair.id,
        annotator=annotator,
        columns=columns | (exchanged(example.labels) if flip else example.labels),
    )


def _example(
    source: Source, row: int, options: DataOptions, kind: Kind, fields: FieldUse
) -> Example | str:
    """The example of a row, or the reason why it cannot be used."""
    record, place = source[row], source.location(row)
    own = kind.of_record(record)
    example = parse(
        record,
        place,
        sides=own.sides,
        drop_empty=options.drop_empty,
        labels=options.labels.reading(own.labels),
        ignore_fields=options.ignore_fields,
        values=fields_read(options.inject),
        fields=fields,
    )
    if kind.sides is None and not isinstance(example, str):
        return with_labels(example, kind.labels, place)
    return example


def _unique_id(example: Example, copies: collections.Counter) -> str:
    content = example.content_id()
    copies[content] += 1
    return f"{content}-{copies[content] - 1}"


def _chunks(
    number: int,
    source: Source,
    to_pairs: ToPairs,
    options: DataOptions,
    kind: Kind,
    counts: collections.Counter,
    records: collections.Counter,
    fields: FieldUse,
    bad: BadRows,
) -> Iterator[list[_Pair]]:
    """Checked pairs, in chunks that fit into the tokenizer's memory."""
    size = min(_CHUNK_ROWS, options.max_pairs or _CHUNK_ROWS)
    items: list[_Pair] = []
    characters = 0
    rows = tqdm(
        range(len(source)), desc="tokenize", unit="row", leave=False, disable=None
    )
    for row in rows:
        place = source.location(row)
        example = bad.attempt(
            lambda row=row: _example(source, row, options, kind, fields), place
        )
        counts["rows"] += 1
        if example is None:
            continue
        if isinstance(example, str):
            counts[f"dropped: {example}"] += 1
            continue
        record_id = _unique_id(example, records)
        for pair in to_pairs(example, place):
            if pair.is_identical:
                counts[f"dropped: {IDENTICAL}"] += 1
                continue
            items.append(_Pair(number, row, place, record_id, pair))
            characters += pair.num_characters()
        if len(items) >= size or characters >= _CHUNK_CHARACTERS:
            yield items
            items, characters = [], 0
    if items:
        yield items
