"""Some rows of a source as tokens, before anything that depends on other rows.

Which pairs are copies, held out or flipped, and which annotators there are, is decided
for all chunks together; see `splits`.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.array_file import Buffer, Damaged, pack, unpack
from jaxpref.data.bad_rows import BadRow, BadRows
from jaxpref.data.chunk_rules import Rules
from jaxpref.data.columns import OF_ANSWERS
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.inject import fields_read, read_topic, subject
from jaxpref.data.rationales import FIELD
from jaxpref.data.records import IDENTICAL, Example, FieldUse, parse
from jaxpref.data.records.lists import with_numbers
from jaxpref.data.shared_prompts import prompt_hash, split_key
from jaxpref.data.sources import Divisible
from jaxpref.data.tokens import Tokens

ROWS = 1024
"""Rows of a chunk."""
NUMBER = "number "
"""Begins the names of arrays with numbers of the records."""
_CHARACTERS = 4_000_000  # tokenized together, to bound the tokenizer's memory


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The pairs of some rows."""

    arrays: dict[str, np.ndarray]
    """See `_Collected`."""
    about: dict[str, Any]
    """See `_Collected`."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.arrays["prompt_lengths"])


def open_chunk(buffer: Buffer) -> Chunk:
    """The chunk in the bytes of `read_chunk`; raises Damaged if they have changed."""
    try:
        return Chunk(*unpack(buffer))
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(str(error)) from None


@functools.cache
def code_digest() -> str:
    """SHA-256 of the code that turns records into tokens."""
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    digest.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    digest.update(f"{sys.version_info} {sys.byteorder}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """SHA-256 of a tokenizer; None if nothing identifies its content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    about = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "template": tokenizer.chat_template,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "stops": list(getattr(tokenizer, "folder_stop_tokens", ())),
        "splits_special": getattr(tokenizer, "split_special_tokens", False),
    }
    text = json.dumps(about, sort_keys=True) + backend.to_str()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_chunk(source: Divisible, tokenizer: Any, rules: Rules) -> bytes:
    """Reads and tokenizes all rows of a source.

    Args:
      source: some rows; see `Divisible.part`.
      tokenizer: from `load_tokenizer`.
      rules: how rows become tokens.

    Returns:
      The bytes that `open_chunk` reads.

    Raises:
      InputError: if a row is malformed and not to be skipped.
    """
    found = _Collected(rules)
    for row in range(source.num_rows):
        found.add_row(source, row)
        if found.waiting_characters >= _CHARACTERS:
            found.tokenize(tokenizer)
    found.tokenize(tokenizer)
    return found.packed()


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One pair before it is tokenized."""

    record: int
    row: int
    part: str
    place: str
    """"file row n", for errors."""
    content: int
    """The hash of its content, as a signed number."""
    example: Example


class _Collected:
    """What is known of the rows so far, in flat arrays."""

    def __init__(self, rules: Rules):
        self.waiting_characters = 0
        self._rules, self._options = rules, rules.options
        self._topic = read_topic(rules.options.inject)
        self._values_read = fields_read(rules.options.inject)
        self._values_read += [FIELD] * rules.kind.rationale
        self._named = rules.options.named_columns
        self._waiting: list[_Pair] = []
        self._fields, self._bad = FieldUse(), BadRows(rules.options.on_bad_row)
        self._bad_parts: list[tuple[int, str, str]] = []
        # (record, why it was dropped), for records and for pairs.
        self._dropped: list[tuple[int, str]] = []
        self._names: dict[str, int] = {}
        self._num_records = 0
        # Of each record with an example: its number and its content's hash.
        self._records, self._contents = array("i"), array("q")
        # Of each pair.
        self._pairs = collections.defaultdict(lambda: array("q"))
        self._numbers = collections.defaultdict(lambda: array("d"))
        # Of each pair, if noise is injected.
        self._values: list[dict[str, Any]] = []
        self._parts: list[str] = []
        # Of each completion, and of each token.
        self._lengths, self._characters = array("i"), array("i")
        self._side_prompt_lengths = array("i")
        self._tokens, self._trained = array("i"), array("b")

    def add_row(self, source: Divisible, row: int) -> None:
        """Checks the records of a row; they wait to be tokenized together."""
        place = source.row_location(row)
        found = self._attempt(lambda: source.records(row), place, row, "")
        if found is None:
            self._num_records += 1
            return
        for part, where, record in found:
            self._add_record(row, part, where, record)

    def _add_record(self, row: int, part: str, place: str, record: Any) -> None:
        number = self._num_records
        self._num_records += 1
        example = self._attempt(lambda: self._example(record, place), place, row, part)
        if example is None:
            return
        if isinstance(example, str):
            self._dropped.append((number, example))
            return
        content = _content(example)
        self._records.append(number)
        self._contents.append(content)
        for pair in self._rules.to_pairs(example, place):
            if pair.is_identical:
                self._dropped.append((number, IDENTICAL))
                continue
            own = content if pair is example else _content(pair)
            self._waiting.append(_Pair(number, row, part, place, own, pair))
            self.waiting_characters += pair.num_characters()

    def _example(self, record: Any, place: str) -> Example | str:
        """The example of a record, or the reason why it cannot be used."""
        kind, options = self._rules.kind, self._options
        own = kind.of_record(record)
        example = parse(
            record,
            place,
            sides=own.sides,
            drop_empty=options.drop_empty,
            columns=own.columns(self._named),
            ignore_fields=options.ignore_fields,
            values=self._values_read,
            fields=self._fields,
            allow_own_prompts=options.own_prompts,
            all_turns=options.train_turns == "all",
        )
        if kind.sides is None and not isinstance(example, str):
            return with_numbers(example, kind.numbers, place)
        return example

    def tokenize(self, tokenizer: Any) -> None:
        """Tokenizes the pairs that wait."""
        pairs, self._waiting, self.waiting_characters = self._waiting, [], 0
        before = len(self._bad.found)
        places = [pair.place for pair in pairs]
        make = self._rules.tokenizing(tokenizer)
        results = self._bad.together(
            lambda some: make(
                [pairs[n].example for n in some], [places[n] for n in some]
            ),
            places,
        )
        failed = [pair for pair, result in zip(pairs, results) if result is None]
        for pair, bad in zip(failed, self._bad.found[before:], strict=True):
            self._bad_parts.append((pair.row, pair.part, bad.reason))
        for pair, result in zip(pairs, results):
            if isinstance(result, str):
                self._dropped.append((pair.record, result))
            elif result is not None:
                for tokens in result if isinstance(result, list) else [result]:
                    self._add_pair(pair, tokens)

    def _add_pair(self, pair: _Pair, tokens: Tokens) -> None:
        example, name = pair.example, pair.example.annotator
        (u,) = hash_uniforms([split_key(example.asked[0])], salt="heldout")
        index = -1 if name is None else self._names.setdefault(name, len(self._names))
        numbers = {
            "record": pair.record,
            "content": pair.content,
            # u is a multiple of 2^-53.
            "heldout": int(u * 2.0**53),
            "prompt": prompt_hash(example.asked[0]),
            "rejected_prompt": prompt_hash(example.asked[-1]),
            "own_prompts": bool(example.own_prompts),
            "row": pair.row,
            "annotator": index,
            "prompt_lengths": len(tokens.prompt),
            "counts": len(tokens.completions),
            "prompt_cut": tokens.prompt_cut,
            "completions_cut": tokens.completions_cut,
            "traces_cut": tokens.traces_cut,
            "turns_dropped": tokens.turns_dropped,
            "flip": example.flip,
            "empty": example.empty,
        }
        for key, value in numbers.items():
            self._pairs[key].append(value)
        self._add_tokens(tokens.prompt)
        own = tokens.side_prompts or [()] * len(tokens.completions)
        masks = tokens.masks or [None] * len(tokens.completions)
        sides = zip(own, tokens.completions, masks, strict=True)
        for side_prompt, completion, mask in sides:
            self._add_tokens(side_prompt)
            self._add_tokens(completion, mask)
            self._side_prompt_lengths.append(len(side_prompt))
            self._lengths.append(len(completion))
        for key, value in example.numbers.items():
            if key in OF_ANSWERS:
                if len(value) != len(tokens.completions):
                    raise ValueError(f"{key}: {len(value)} numbers of a list")
                self._numbers[key].extend(value)
            else:
                self._numbers[key].append(value)
        if self._options.inject.active:
            about = subject(example, self._topic)
            # A rationale has none.
            more = len(tokens.completions) - len(about.characters)
            self._characters.extend([*about.characters, *[0] * more])
            self._values.append(dict(about.values))
            self._pairs["topic"].append(about.matches)
            self._parts.append(pair.part)

    def _add_tokens(
        self, tokens: Sequence[int], mask: Sequence[bool] | None = None
    ) -> None:
        self._tokens.extend(tokens)
        if self._options.train_turns == "all":
            self._trained.extend([1] * len(tokens) if mask is None else mask)

    def packed(self) -> bytes:
        """The bytes; token ids have 16 bits where they fit."""
        tokens = np.array(self._tokens, np.int32)
        wide = tokens.max(initial=0) >= 1 << 16
        narrow = {
            "annotator": np.int32,
            "record": np.int32,
            "row": np.int32,
            "prompt_lengths": np.int32,
            "counts": np.int32,
            "completions_cut": np.int32,
            "traces_cut": np.int32,
            **dict.fromkeys(
                (
                    "prompt_cut",
                    "turns_dropped",
                    "flip",
                    "empty",
                    "own_prompts",
                    "topic",
                ),
                np.bool_,
            ),
        }
        arrays = {
            name: np.array(self._pairs[name], narrow.get(name, np.int64))
            for name in _PAIRS
        }
        arrays |= {
            "records": np.array(self._records, np.int32),
            "contents": np.array(self._contents, np.int64),
            "lengths": np.array(self._lengths, np.int32),
            "side_prompt_lengths": np.array(self._side_prompt_lengths, np.int32),
            "characters": np.array(self._characters, np.int32),
            "tokens": tokens.astype(np.int32 if wide else np.uint16),
            "trained": np.array(self._trained, np.bool_),
        }
        numbers = {f"{NUMBER}{k}": np.array(v) for k, v in self._numbers.items()}
        about = {
            "num_records": self._num_records,
            "dropped": self._dropped,
            "bad": sorted(self._bad_parts, key=lambda bad: bad[0]),
            "annotators": list(self._names),
            "fields": self._fields.counts(),
            "values": self._values if any(self._values) else [],
            "parts": self._parts if any(self._parts) else [],
        }
        return pack(arrays | numbers, about)

    def _attempt(self, read: Callable, place: str, row: int, part: str) -> Any:
        before = len(self._bad.found)
        found = self._bad.attempt(read, place)
        for bad in self._bad.found[before:]:
            self._bad_parts.append((row, part, bad.reason))
        return found


_PAIRS = (
    *("record", "content", "heldout", "prompt", "annotator", "prompt_lengths"),
    *("counts", "prompt_cut", "completions_cut", "traces_cut", "turns_dropped"),
    *("flip", "empty", "topic", "row", "rejected_prompt", "own_prompts"),
)
"""Arrays with a number for each pair."""


def _content(example: Example) -> int:
    """The content's hash, as a signed number of 64 bits."""
    number = int(example.content_id(), 16)
    return number - (1 << 64) if number >> 63 else number


def bad_rows(chunk: Chunk, location: Callable[[int], str]) -> Sequence[BadRow]:
    """The malformed rows of a chunk that were skipped; `location` is that of a row."""
    return [
        BadRow(f"{location(row)} {part}".rstrip(), reason)
        for row, part, reason in chunk.about["bad"]
    ]
