"""From a source to training and held-out data: read, tokenize, drop, split, flip."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data import chunk
from jaxpref.data.all_pairs import AllPairs
from jaxpref.data.bad_rows import BadRow
from jaxpref.data.chunk_cache import ChunkReader
from jaxpref.data.chunk_rules import Rules
from jaxpref.data.columns import accept
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.inject import read_noise
from jaxpref.data.joint import with_trained_prompts
from jaxpref.data.kinds import PAIRS, Kind
from jaxpref.data.mismatched import with_mismatched
from jaxpref.data.options import DEFAULTS, DataOptions
from jaxpref.data.records import FieldUse
from jaxpref.data.sources import Source, divisible
from jaxpref.data.to_pairs import (
    ToPairs,
    labeled_answers,
    only_empty,
    unchanged,
    with_empty,
    with_empty_too,
)
from jaxpref.errors import InputError


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
    folder: Path | None = None,
) -> Splits:
    """Turns sources into tokenized, split and optionally flipped pairs.

    A pair's id is the hash of its content before flipping plus its occurrence, so the
    third copy of a row ends in "-2".  Splits depend on the hash of the prompt and flips
    on the hash of the id, and not on the order of rows or on other rows.  Only if the
    answers of records have two prompts are these held out together; see
    `prompt_groups`.

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
      folder: where tokenized records are kept and found; see `chunk_cache`.  All
        processes of a run must then call this together.

    Raises:
      InputError: if a record is malformed, or none is left.
    """
    to_pairs = labeled_answers if "desirable" in kind.numbers else unchanged
    parts = [(x, to_pairs) for x in (source, *more)]
    if options.train_turns == "all":
        _check_turns(kind, whole_turns)
    return _make_splits(parts, tokenizer, options, kind, whole_turns, folder)


def make_mixed_splits(
    source: Source,
    tokenizer: Any,
    options: DataOptions = DEFAULTS,
    *,
    empty: Source | None = None,
    folder: Path | None = None,
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
      folder: as for `make_splits`.

    Raises:
      InputError: as for `make_splits`, or if there are no pairs of one kind.
    """
    if options.train_turns == "all":
        raise InputError(
            "--train-turns all: bvpo reads answers of one turn, with and without a"
            " trace; leave it out"
        )
    parts = [(source, with_empty_too if empty is None else with_empty)]
    if empty is not None:
        parts += [(empty, only_empty)]
    splits = _make_splits(parts, tokenizer, options, PAIRS, folder=folder)
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


def _check_turns(kind: Kind, whole_turns: bool) -> None:
    """Refuses objectives to which earlier turns of the assistant mean nothing."""
    reasons = {
        "a reward model reads its score at the last token only": whole_turns,
        "the loss is on prompts too (joint)": kind.joint,
        "a rationale explains one answer": kind.rationale,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"--train-turns all: {reason}; leave it out")


def _make_splits(
    parts: Sequence[tuple[Source, ToPairs]],
    tokenizer: Any,
    options: DataOptions,
    kind: Kind,
    whole_turns: bool = False,
    folder: Path | None = None,
) -> Splits:
    noise = read_noise(options.inject)
    noise.check_kind(kind)
    place = f"{parts[0][0].location(0)} and all after it"
    pairs = AllPairs(options, kind)
    # A chunk serves every objective, and other processes may make it.  Each process of
    # a run checks the numbers of all chunks, whoever made them; see `AllPairs`.
    plain = dataclasses.replace(kind, check=accept)
    rows = min(chunk.ROWS, options.max_pairs or chunk.ROWS)
    for source, to_pairs in parts:
        rules = Rules(to_pairs, options, plain, whole_turns)
        pairs.add(ChunkReader(divisible(source), tokenizer, rules, rows, folder))
    counts, bad = pairs.counts(), pairs.bad
    if not len(pairs):
        counts |= {"train": 0, "heldout": 0, "skipped": len(bad)}
        dropped = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n)
        dropped += f"; the first: {bad[0].reason}" if bad else ""
        raise InputError(f"{place}: no record is left ({dropped})")
    drawn = noise if options.inject.active else None
    labeled = pairs.labeled(drawn, options.heldout_share)
    noise.check_used(place)
    datasets = labeled.datasets(kind.num_read)
    counts |= labeled.counts()
    counts |= {"train": len(datasets[0]), "heldout": len(datasets[1])}
    counts["skipped"] = len(bad)
    if kind.mismatched:
        add = functools.partial(
            with_mismatched, max_length=options.longest, place=place
        )
        datasets = add(datasets[0]), add(datasets[1], others=datasets[0])
    if kind.joint:
        datasets = tuple(map(with_trained_prompts, datasets))
    digest = hashlib.sha256("".join(x.digest() for x in datasets).encode()).hexdigest()
    return Splits(
        *datasets,
        report=counts,
        digest=digest,
        fields=pairs.fields,
        kind=kind,
        skipped=tuple(bad),
    )
