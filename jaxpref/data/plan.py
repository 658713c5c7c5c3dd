"""The plan: read, check, tokenise, drop, split and flip, once, before any batch."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from jaxpref.data.formats import Example, parse, parse_prompt, prompt_key
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.noise import flip_symmetric, read_rates
from jaxpref.data.pairs import Pairs, PairsBuilder
from jaxpref.data.sources import Source
from jaxpref.data.tokenize import Tokens, encode_prompt, tokenize
from jaxpref.errors import InputError

_CHUNK_ROWS = 1024
_CHUNK_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to make of a source."""

    max_length: int = 1024
    """Most tokens of prompt and completion together, BOS and EOS included."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt, BOS included; longer ones are cut on the left.  None
    means half of max_length."""
    heldout_fraction: float = 0.05
    """Share of the prompts held out for evaluation, chosen by hash of the prompt."""
    flip_rate: float = 0.0
    """Probability of swapping chosen and rejected of a training pair (label noise)."""
    flip_seed: int = 0
    """Which pairs are flipped."""
    flip_annotators: str | None = None
    """JSON file of flip rates by annotator, as {"ann": 0.1, "bob": 0.6}; pairs of other
    annotators have flip_rate."""
    flip_longer: float | None = None
    """Flip rate of the training pairs whose chosen completion has more characters than
    the rejected one; the others have flip_rate.  None makes no difference."""
    max_pairs: int | None = None
    """Stop reading once so many pairs are kept; None reads all."""
    drop_empty: bool = False
    """Drop and count records with an empty completion instead of stopping at one."""

    def __post_init__(self):
        if not 2 <= self.longest_prompt <= self.max_length:
            raise InputError(
                f"max_prompt_length {self.longest_prompt} must be from 2 to"
                f" max_length {self.max_length}"
            )
        if not 0 <= self.heldout_fraction <= 1:
            raise InputError(
                f"heldout_fraction {self.heldout_fraction} must be from 0 to 1"
            )
        if not 0 <= self.flip_rate <= 1:
            raise InputError(f"flip_rate {self.flip_rate} must be from 0 to 1")
        if self.flip_longer is not None and not 0 <= self.flip_longer <= 1:
            raise InputError(f"flip_longer {self.flip_longer} must be from 0 to 1")
        if self.flip_annotators and self.flip_longer is not None:
            raise InputError(
                "flip_annotators and flip_longer both say how often a pair is flipped: "
                "give one of them"
            )
        if self.max_pairs is not None and self.max_pairs < 1:
            raise InputError(f"max_pairs {self.max_pairs} must be positive")

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt: `max_prompt_length`, or half of `max_length`."""
        half = self.max_length // 2
        return half if self.max_prompt_length is None else self.max_prompt_length

    @property
    def injects_noise(self) -> bool:
        """Whether any pair may be flipped."""
        return bool(self.flip_rate or self.flip_longer or self.flip_annotators)

    def without_noise(self) -> "DataOptions":
        """The same with labels as in the file."""
        return dataclasses.replace(
            self, flip_rate=0.0, flip_annotators=None, flip_longer=None
        )


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
    """SHA-256 (hex) of both; equal exactly where tokens, labels, known flips, annotator
    indices and order are equal."""

    def describe(self) -> str:
        """The report in one line, counts of nothing left out."""
        return ", ".join(
            f"{name} {count}" for name, count in self.report.items() if count
        )


def make_plan(
    source: Source,
    tokenizer: Any,
    options: DataOptions = DataOptions(),
    *,
    sides: int = 2,
) -> Plan:
    """Turn a source into tokenised, split and (if asked) noised pairs.

    A pair's id is the hash of its content before flipping plus its occurrence, so the
    third copy of a row ends in "-2".  Splits are decided by hash of the prompt and
    flips by hash of the id: neither depends on the order of rows or on other rows.
    Held-out labels are never flipped.  `flips` is true where the label is known to be
    wrong, by the file or by injected noise; flipped by both, it is right again.

    Args:
      source: from `open_source`, or any sequence of records with `location`.
      tokenizer: from `load_tokenizer`.
      options: lengths, split, noise.
      sides: K, 2 for pairs, 1 for plain completions (SFT).

    Raises:
      InputError: a record is malformed, or none is left.
    """
    if options.injects_noise and sides == 1:
        raise InputError("flip_rate needs pairs: a plain completion cannot be flipped")
    rates = read_rates(options.flip_annotators) if options.flip_annotators else {}
    counts = collections.Counter()
    copies: collections.Counter[str] = collections.Counter()
    train, heldout = PairsBuilder(sides), PairsBuilder(sides)
    limit = len(source) if options.max_pairs is None else options.max_pairs
    with tqdm(
        total=len(source), desc="tokenise", unit="row", leave=False, disable=None
    ) as bar:
        chunks = _chunks(
            source,
            sides=sides,
            drop_empty=options.drop_empty,
            size=min(_CHUNK_ROWS, limit),
            counts=counts,
        )
        for rows, examples in chunks:
            results = tokenize(
                examples,
                [source.location(row) for row in rows],
                tokenizer,
                max_length=options.max_length,
                max_prompt_length=options.longest_prompt,
            )
            for row, example, result in zip(rows, examples, results):
                if isinstance(result, str):
                    counts[f"dropped: {result}"] += 1
                elif len(train) + len(heldout) < limit:
                    pair_id = _unique_id(example, copies)
                    _add(
                        train, heldout, row, example, result, pair_id, options, rates,
                        counts,
                    )  # fmt: skip
            bar.update(counts["rows"] - bar.n)
            if len(train) + len(heldout) == limit:
                break
    counts.update(train=len(train), heldout=len(heldout))
    if not len(train) + len(heldout):
        dropped = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n)
        raise InputError(
            f"{source.location(0)} and all after it: no record is left ({dropped})"
        )
    names = sorted(train.annotators() | heldout.annotators())
    if rates and not rates.keys() & set(names):
        raise InputError(
            f"{options.flip_annotators}: no pair of {source.location(0)} and all after "
            f"it is by one of its annotators; the pairs' are "
            f"{', '.join(names[:5]) or 'not named'}"
        )
    pairs = (train.build(names), heldout.build(names))
    digest = hashlib.sha256("".join(p.digest() for p in pairs).encode()).hexdigest()
    return Plan(*pairs, report=dict(counts), digest=digest)


def _add(
    train: PairsBuilder,
    heldout: PairsBuilder,
    row: int,
    example: Example,
    tokens: Tokens,
    pair_id: str,
    options: DataOptions,
    rates: Mapping[str, float],
    counts: collections.Counter,
) -> None:
    """Decide split and label of one pair, and store it."""
    (u,) = hash_uniforms([prompt_key(example.prompt)], salt="heldout")
    hold = u < options.heldout_fraction
    rate = _flip_rate(example, options, rates)
    (flip,) = flip_symmetric([pair_id], rate=rate, seed=options.flip_seed)
    flip = bool(flip) and not hold
    counts["prompts cut"] += tokens.prompt_cut
    counts["completions cut"] += tokens.completions_cut
    counts["flipped"] += flip
    counts["flips in the file"] += example.flip
    (heldout if hold else train).add(
        tokens.prompt,
        tokens.completions[::-1] if flip else tokens.completions,
        id=pair_id,
        flip=example.flip != flip,
        annotator=example.annotator,
        row=row,
    )


def _flip_rate(
    example: Example, options: DataOptions, rates: Mapping[str, float]
) -> float:
    """How often this pair's label is flipped: by annotator, by length, or as all."""
    if example.annotator in rates:
        return rates[example.annotator]
    if options.flip_longer is not None:
        # Characters and not tokens: the same pairs are flipped for every model.
        chosen, rejected = (
            len(text if isinstance(text, str) else text["content"])
            for text in example.completions
        )
        return options.flip_longer if chosen > rejected else options.flip_rate
    return options.flip_rate


def _unique_id(example: Example, copies: collections.Counter) -> str:
    content = example.content_id()
    copies[content] += 1
    return f"{content}-{copies[content] - 1}"


def _chunks(
    source: Source,
    *,
    sides: int,
    drop_empty: bool,
    size: int,
    counts: collections.Counter,
) -> Iterator[tuple[list[int], list[Example]]]:
    """Checked examples, few and short enough at a time for the tokenizer's memory."""
    rows: list[int] = []
    examples: list[Example] = []
    characters = 0
    for row in range(len(source)):
        example = parse(
            source[row], source.location(row), sides=sides, drop_empty=drop_empty
        )
        counts["rows"] += 1
        if isinstance(example, str):
            counts[f"dropped: {example}"] += 1
            continue
        rows.append(row)
        examples.append(example)
        characters += example.num_characters()
        if len(rows) == size or characters >= _CHUNK_CHARACTERS:
            yield rows, examples
            rows, examples, characters = [], [], 0
    if rows:
        yield rows, examples


def read_prompts(
    source: Source,
    tokenizer: Any,
    *,
    limit: int,
    max_prompt_length: int = DataOptions().longest_prompt,
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
