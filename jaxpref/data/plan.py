"""The plan: read, check, tokenise, drop, split and flip, once, before any batch."""

import collections
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxpref.data.formats import (
    IDENTICAL,
    Example,
    expand,
    parse,
    parse_prompt,
    prompt_key,
)
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.labels import exchanged
from jaxpref.data.noise import flip_symmetric, read_rates
from jaxpref.data.options import DEFAULTS, DataOptions, InjectOptions
from jaxpref.data.pairs import Pairs, PairsBuilder
from jaxpref.data.sources import Source
from jaxpref.data.tokenize import Tokens, encode_prompt, tokenize
from jaxpref.errors import InputError
from jaxpref.runtime import heartbeat

_CHUNK_ROWS = 1024
_CHUNK_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """The pairs of a run, and what was left out."""

    train: Pairs
    """To train on; labels with the injected noise."""
    heldout: Pairs
    """To evaluate on; labels as in the file."""
    report: dict[str, int]
    """Counts: rows read, kept, dropped (by reason), cut and flipped."""
    digest: str
    """SHA-256 (hex) of both; equal exactly where tokens, labels and their numbers,
    known flips, annotator indices, empty traces and order are equal."""

    def describe(self) -> str:
        """The report in one line, counts of nothing left out."""
        return ", ".join(
            f"{name} {count}" for name, count in self.report.items() if count
        )


def make_plan(
    source: Source,
    tokenizer: Any,
    options: DataOptions = DEFAULTS,
    *,
    sides: int = 2,
) -> Plan:
    """Turn a source into tokenised, split and (if asked) noised pairs.

    A pair's id is the hash of its content before flipping plus its occurrence, so the
    third copy of a row ends in "-2".  Splits are decided by hash of the prompt and
    flips by hash of the id: neither depends on the order of rows or on other rows.
    A record with several traces is a pair for each of them, with an id of its own; its
    one label is flipped, by hash of the record, in all of them or in none.  Held-out
    labels are never flipped.  `flips` is true where the label is known to be
    wrong, by the file or by injected noise; flipped by both, it is right again.

    Args:
      source: from `open_source`, or any sequence of records with `location`.
      tokenizer: from `load_tokenizer`.
      options: lengths, split, noise.
      sides: K, 2 for pairs, 1 for plain completions (SFT).

    Raises:
      InputError: a record is malformed, or none is left.
    """
    return _make_plan([(source, _as_it_is)], tokenizer, options, sides)


def make_mixed_plan(
    source: Source,
    tokenizer: Any,
    options: DataOptions = DEFAULTS,
    *,
    empty: Source | None = None,
) -> Plan:
    """The plan of a run that mixes pairs with traces and pairs with an empty trace.

    Both kinds are in the same `Pairs`, told apart by `Pairs.empty`.  As `make_plan`,
    and beside that: every pair without a trace is given an empty one, and without a
    source of its own, so is every record with traces, once more, with its answers.

    Args:
      source: records with traces; others of it count among those with an empty one.
      tokenizer: from `load_tokenizer`.
      options: lengths, split, noise, markers; for both sources.
      empty: records without traces, made with thinking switched off.

    Raises:
      InputError: as for `make_plan`; or one kind is not there at all.
    """
    parts = [(source, _with_empty_too if empty is None else _with_empty)]
    if empty is not None:
        parts += [(empty, _only_empty)]
    plan = _make_plan(parts, tokenizer, options, 2)
    is_empty = np.concatenate([plan.train.empty, plan.heldout.empty])
    counts = {
        "with a trace": int((~is_empty).sum()),
        "with an empty trace": int(is_empty.sum()),
    }
    plan = dataclasses.replace(plan, report=plan.report | counts)
    for kind, where, cure in (
        ("with a trace", source, "write the sides as {trace, answer}"),
        ("with an empty trace", empty or source, "their answers must differ"),
    ):
        if not counts[kind]:
            raise InputError(
                f"{where.location(0)} and all after it: no pair {kind} is left"
                f" ({plan.describe()}); {cure}"
            )
    return plan


PairsOf = Callable[[Example, str], list[Example]]
"""`(record, place) -> pairs`: what a record is in a run."""


def _as_it_is(example: Example, place: str) -> list[Example]:
    return expand(example)


def _with_empty(example: Example, place: str) -> list[Example]:
    return expand(example) if example.traces else _only_empty(example, place)


def _with_empty_too(example: Example, place: str) -> list[Example]:
    empty = dataclasses.replace(example, traces=(), empty=True)
    return [*expand(example), empty] if example.traces else [empty]


def _only_empty(example: Example, place: str) -> list[Example]:
    if example.traces:
        raise InputError(
            f"{place}: field 'trace' stands in data that is made without traces; leave"
            " it out, or use the file as the data with traces"
        )
    return [dataclasses.replace(example, empty=True)]


def _make_plan(
    parts: Sequence[tuple[Source, PairsOf]],
    tokenizer: Any,
    options: DataOptions,
    sides: int,
) -> Plan:
    if options.inject.active and sides == 1:
        raise InputError(
            "--inject needs pairs: a single completion has no label to flip"
        )
    rates = read_rates(options.inject.annotators) if options.inject.annotators else {}
    counts = collections.Counter()
    copies: collections.Counter[str] = collections.Counter()
    records: collections.Counter[str] = collections.Counter()
    train, heldout = PairsBuilder(sides), PairsBuilder(sides)
    limit = sys.maxsize if options.max_pairs is None else options.max_pairs
    for number, (source, pairs_of) in enumerate(parts):
        kept, last = 0, -1
        chunks = _chunks(number, source, pairs_of, options, sides, counts, records)
        for items in chunks:
            heartbeat.beat(f"reading {source.location(items[-1].row)}")
            results = tokenize(
                [item.example for item in items],
                [source.location(item.row) for item in items],
                tokenizer,
                max_length=options.longest,
                max_prompt_length=options.longest_prompt,
                markers=options.markers,
            )
            for item, result in zip(items, results):
                if isinstance(result, str):
                    counts[f"dropped: {result}"] += 1
                elif kept < limit or item.row == last:
                    pair_id = _unique_id(item.example, copies)
                    _add(train, heldout, item, result, pair_id, options, rates, counts)
                    kept, last = kept + 1, item.row
            if kept >= limit:
                break
    source, _ = parts[0]
    counts.update(train=len(train), heldout=len(heldout))
    if not len(train) + len(heldout):
        dropped = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n)
        raise InputError(
            f"{source.location(0)} and all after it: no record is left ({dropped})"
        )
    names = sorted(train.annotators() | heldout.annotators())
    if rates and not rates.keys() & set(names):
        raise InputError(
            f"{options.inject.annotators}: no pair of {source.location(0)} and all "
            f"after it is by one of its annotators; the pairs' are "
            f"{', '.join(names[:5]) or 'not named'}"
        )
    pairs = (train.build(names), heldout.build(names))
    digest = hashlib.sha256("".join(p.digest() for p in pairs).encode()).hexdigest()
    return Plan(*pairs, report=dict(counts), digest=digest)


@dataclasses.dataclass(frozen=True)
class _Item:
    """One pair on its way into the plan."""

    source: int
    """Its number; see `Pairs.sources`."""
    row: int
    record_id: str
    """As a pair's id, of the whole record."""
    example: Example


def _add(
    train: PairsBuilder,
    heldout: PairsBuilder,
    item: _Item,
    tokens: Tokens,
    pair_id: str,
    options: DataOptions,
    rates: Mapping[str, float],
    counts: collections.Counter,
) -> None:
    """Decide split and label of one pair, and store it."""
    example = item.example
    (u,) = hash_uniforms([prompt_key(example.prompt)], salt="heldout")
    hold = u < options.heldout_fraction
    rate = _flip_rate(example, options.inject, rates)
    (flip,) = flip_symmetric([item.record_id], rate=rate, seed=options.inject.seed)
    flip = bool(flip) and not hold
    counts["prompts cut"] += tokens.prompt_cut
    counts["completions cut"] += tokens.completions_cut
    counts["traces cut"] += tokens.traces_cut
    counts["flipped"] += flip
    counts["flips in the file"] += example.flip
    (heldout if hold else train).add(
        tokens.prompt,
        tokens.completions[::-1] if flip else tokens.completions,
        id=pair_id,
        flip=example.flip != flip,
        annotator=example.annotator,
        row=item.row,
        source=item.source,
        empty=example.empty,
        labels=exchanged(example.labels) if flip else example.labels,
    )


def _flip_rate(
    example: Example, inject: InjectOptions, rates: Mapping[str, float]
) -> float:
    """How often this pair's label is flipped: by annotator, by length, or as all."""
    if example.annotator in rates:
        return rates[example.annotator]
    if inject.longer is not None:
        # Characters and not tokens: the same pairs are flipped for every model.
        chosen, rejected = (
            len(text if isinstance(text, str) else text["content"])
            for text in example.completions
        )
        return inject.longer if chosen > rejected else inject.flip_rate
    return inject.flip_rate


def _unique_id(example: Example, copies: collections.Counter) -> str:
    content = example.content_id()
    copies[content] += 1
    return f"{content}-{copies[content] - 1}"


def _chunks(
    number: int,
    source: Source,
    pairs_of: PairsOf,
    options: DataOptions,
    sides: int,
    counts: collections.Counter,
    records: collections.Counter,
) -> Iterator[list[_Item]]:
    """Checked pairs, few and short enough at a time for the tokenizer's memory."""
    size = min(_CHUNK_ROWS, options.max_pairs or _CHUNK_ROWS)
    items: list[_Item] = []
    characters = 0
    rows = tqdm(
        range(len(source)), desc="tokenise", unit="row", leave=False, disable=None
    )
    for row in rows:
        place = source.location(row)
        example = parse(
            source[row],
            place,
            sides=sides,
            drop_empty=options.drop_empty,
            labels=options.labels,
        )
        counts["rows"] += 1
        if isinstance(example, str):
            counts[f"dropped: {example}"] += 1
            continue
        record_id = _unique_id(example, records)
        for pair in pairs_of(example, place):
            if pair.is_identical:
                counts[f"dropped: {IDENTICAL}"] += 1
                continue
            items.append(_Item(number, row, record_id, pair))
            characters += pair.num_characters()
        if len(items) >= size or characters >= _CHUNK_CHARACTERS:
            yield items
            items, characters = [], 0
    if items:
        yield items


def read_prompts(
    source: Source,
    tokenizer: Any,
    *,
    limit: int,
    max_prompt_length: int = DEFAULTS.longest_prompt,
) -> tuple[list[str], list[list[int]]]:
    """The first `limit` different prompts of a source, as they are in training.

    Returns:
      The text of each (of a conversation its last message), and its tokens.
    """
    texts: list[str] = []
    tokens: list[list[int]] = []
    seen: set[str] = set()
    for row in range(len(source)):
        place = source.location(row)
        prompt = parse_prompt(source[row], place)
        if prompt is None or prompt_key(prompt) in seen:
            continue
        seen.add(prompt_key(prompt))
        texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        tokens.append(
            encode_prompt(
                tokenizer, prompt, place=place, max_prompt_length=max_prompt_length
            )
        )
        if len(texts) == limit:
            break
    return texts, tokens
