"""All pairs of a run, from chunks of tokens: copies, split, noise, and datasets.

Everything that depends on several records is decided here, on flat arrays, in the order
of the records.
"""

import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpref.data.bad_rows import BadRow
from jaxpref.data.chunk import NUMBER, Chunk, bad_rows
from jaxpref.data.chunk_cache import ChunkReader
from jaxpref.data.columns import OF_ANSWERS, exchanged
from jaxpref.data.dataset import COLUMNS, PROMPTS, PreferenceDataset
from jaxpref.data.inject import Noise, Subject
from jaxpref.data.kinds import Kind
from jaxpref.data.options import DataOptions
from jaxpref.data.pieces import Piece, of_tokens
from jaxpref.data.prompt_groups import PromptGroups
from jaxpref.data.records import FieldUse
from jaxpref.data.sources import Divisible
from jaxpref.errors import InputError
from jaxpref.runtime.processes import log


class AllPairs:
    """The chunks of all sources, as they are read."""

    def __init__(self, options: DataOptions, kind: Kind):
        """About `max_pairs` of each source are used: those of whole records."""
        self._limit = sys.maxsize if options.max_pairs is None else options.max_pairs
        self._skip = options.on_bad_row == "skip"
        self._fields, self._check = kind.columns(options.named_columns), kind.check
        self.pieces: list[Piece] = []
        self.sources: list[Divisible] = []
        self._dropped: collections.Counter[str] = collections.Counter()
        self._records = 0
        self.fields = FieldUse()
        self.bad: list[BadRow] = []

    def __len__(self) -> int:
        return sum(int((~piece.refused).sum()) for piece in self.pieces)

    def add(self, reader: ChunkReader) -> None:
        """Reads the pairs of a further source, until there are enough.

        Raises:
          InputError: if a row is malformed and not to be skipped.
        """
        number = len(self.sources)
        self.sources.append(reader.source)
        start, pairs, records = 0, 0, 0
        while start < len(reader) and pairs < self._limit:
            # As many rows as pairs are missing; mostly, a row is a pair.
            missing = -(-(self._limit - pairs) // reader.rows)
            end = min(len(reader), start + missing)
            for index, chunk in enumerate(reader.read(range(start, end)), start):
                row = index * reader.rows
                self._count(chunk, reader.source, row)
                used = _whole_records(chunk["record"], self._limit - pairs)
                refused = self._refused(chunk, reader.source, row)[:used]
                self.pieces.append(Piece(chunk, number, row, records, used, refused))
                records += chunk.about["num_records"]
                pairs += used
                if pairs >= self._limit:
                    break
            start = end

    def _count(self, chunk: Chunk, source: Divisible, first_row: int) -> None:
        self._records += chunk.about["num_records"]
        self._dropped.update(reason for _, reason in chunk.about["dropped"])
        self.fields.include(chunk.about["fields"])
        self.bad += bad_rows(chunk, lambda row: source.row_location(first_row + row))

    def _refused(self, chunk: Chunk, source: Divisible, first_row: int) -> np.ndarray:
        """Which pairs have a number that the objective refuses, bool [pairs].

        The objective is not known where chunks are made.
        """
        refused = np.zeros(len(chunk), np.bool_)
        for name, field in self._fields.items():
            values = chunk.arrays.get(NUMBER + name, np.zeros(0))
            reasons = {}
            for value in np.unique(values).tolist():
                try:
                    self._check(name, value)
                except ValueError as error:
                    reasons[value] = str(error)
            for n in np.flatnonzero(np.isin(values, list(reasons))).tolist():
                place = source.row_location(first_row + int(chunk["row"][n]))
                reason = f"field '{field}' for {name}: {reasons[values[n]]}"
                if not self._skip:
                    raise InputError(f"{place}: {reason} Correct it or remove the row")
                self.bad.append(BadRow(place, reason))
                refused[n] = True
        return refused

    def counts(self) -> dict[str, int]:
        """The number of records, and of those that were dropped, by reason."""
        dropped = {f"dropped: {reason}": n for reason, n in self._dropped.items()}
        return {"rows": self._records} | dropped

    def labeled(self, noise: Noise | None, heldout_share: float) -> "LabeledPairs":
        """Decides which pairs are held out, and the labels of the others.

        Args:
          noise: the injected noise, if there is any.
          heldout_share: the share of the prompts to hold out.

        Raises:
          InputError: if the noise depends on a field with a wrong value.
        """
        names: dict[str, int] = {}
        annotators = [_annotators(piece, names) for piece in self.pieces]
        holds = self._held_out(heldout_share)
        flips = [np.zeros(len(hold), np.bool_) for hold in holds]
        if noise is not None:
            contents = [piece.chunk["contents"] for piece in self.pieces]
            ends = np.cumsum([len(x) for x in contents])[:-1]
            occurrences = np.split(_occurrences(np.concatenate(contents)), ends)
            for n, piece in enumerate(self.pieces):
                source = self.sources[piece.source]
                annotators[n], flips[n] = _drawn(
                    piece, source, noise, holds[n], occurrences[n], names
                )
        return LabeledPairs(
            self.pieces,
            tuple(names),
            *(np.concatenate(x) for x in (annotators, holds, flips)),
        )

    def _held_out(self, share: float) -> list[np.ndarray]:
        """Which pairs are held out, bool, for each piece.

        Pairs whose answers follow different prompts are held out by groups of prompts.
        """
        if not share:
            return [np.zeros(piece.used, np.bool_) for piece in self.pieces]
        several = [x.of_pairs("own_prompts").astype(np.bool_) for x in self.pieces]
        own = [
            np.concatenate(
                [x.of_pairs(name)[at] for x, at in zip(self.pieces, several)]
            )
            for name in PROMPTS
        ]
        groups = PromptGroups(*own)
        if len(own[0]):
            log(groups.describe())
        return [
            groups.uniforms(x.of_pairs("prompt"), x.of_pairs("heldout") * 2.0**-53)
            < share
            for x in self.pieces
        ]


@dataclasses.dataclass(frozen=True)
class LabeledPairs:
    """All pairs, with what depends on other records."""

    pieces: Sequence[Piece]
    names: tuple[str, ...]
    """Names of annotators, some maybe of no pair."""
    annotators: np.ndarray
    """int32 [N]; index into `names`, -1 if unknown."""
    hold: np.ndarray
    """bool [N]; whether the pair is held out."""
    flips: np.ndarray
    """bool [N]; whether injected noise reverses the label."""

    def counts(self) -> dict[str, int]:
        """What was cut and flipped."""
        total = lambda name: int(self._each(name)[~self._refused].sum())
        return {
            "prompts cut": total("prompt_cut"),
            "completions cut": total("completions_cut"),
            "traces cut": total("traces_cut"),
            "prompts without earlier turns": total("turns_dropped"),
            "flipped": int(self.flips[~self._refused].sum()),
            "flips in the file": total("flip"),
        }

    def datasets(
        self, num_completions: int | None
    ) -> tuple[PreferenceDataset, PreferenceDataset]:
        """The training and the held-out pairs.

        Args:
          num_completions: K; None for the largest number of all pairs.
        """
        counts = self._each("counts")
        most = num_completions or int(counts.max())
        table = lambda name: self._swapped(
            _table(self._each(name, of_completions=True), counts, most)
        )
        lengths, own = table("lengths"), table("side_prompt_lengths")
        columns = self._columns() | self._numbers(counts, most)
        used = np.unique(self.annotators[self.annotators >= 0]).tolist()
        names = sorted(used, key=lambda n: self.names[n])
        ranks = np.full(len(self.names) + 1, -1, np.int32)  # the last is for -1
        ranks[names] = np.arange(len(names))
        columns["annotator"] = ranks[self.annotators]
        order = [*COLUMNS, *(name for name in columns if name not in COLUMNS)]
        found = []
        for mask in (~self.hold & ~self._refused, self.hold & ~self._refused):
            kept = order if mask.any() else COLUMNS
            prompts = self._each("prompt_lengths")[mask]
            sizes = prompts + (own + lengths)[mask].sum(1, dtype=np.int64)
            offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            found.append(
                PreferenceDataset(
                    tokens=self._of_tokens("tokens", np.int32, mask, int(offsets[-1])),
                    offsets=offsets,
                    prompt_lengths=prompts,
                    side_prompt_lengths=own[mask],
                    completion_lengths=lengths[mask],
                    ids=self._ids[mask],
                    columns={name: columns[name][mask] for name in kept},
                    annotator_names=tuple(self.names[n] for n in names),
                    trained=self._of_tokens("trained", np.bool_, mask, int(offsets[-1]))
                    if any(len(piece.chunk["trained"]) for piece in self.pieces)
                    else None,
                )
            )
        return found[0], found[1]

    def _each(self, name: str, *, of_completions: bool = False) -> np.ndarray:
        """An array of all pieces."""
        take = Piece.of_completions if of_completions else Piece.of_pairs
        return np.concatenate([take(piece, name) for piece in self.pieces])

    def _swapped(self, table: np.ndarray) -> np.ndarray:
        """Numbers of completions [N, most], swapped where pairs are flipped.

        Only pairs and single answers are ever flipped; a rationale stays as it is.
        """
        if table.shape[1] > 1:
            table[self.flips, :2] = table[self.flips, 1::-1]
        return table

    def _columns(self) -> dict[str, np.ndarray]:
        repeat = lambda values: np.repeat(values, [x.used for x in self.pieces])
        prompts = [self._each(name) for name in PROMPTS]
        records = self._each("record") + repeat([x.first_record for x in self.pieces])
        rows = self._each("row") + repeat([x.first_row for x in self.pieces])
        return {
            "is_flipped": self._each("flip") != self.flips,
            "row": records.astype(np.int64),
            "file_row": rows.astype(np.int64),
            "source": repeat(np.array([x.source for x in self.pieces], np.int16)),
            "empty_trace": self._each("empty"),
            "prompt": np.where(self.flips, prompts[1], prompts[0]),
            "rejected_prompt": np.where(self.flips, prompts[0], prompts[1]),
        }

    def _numbers(self, counts: np.ndarray, most: int) -> dict[str, np.ndarray]:
        """Numbers, float32 [N] or [N, K] by name, exchanged where pairs are flipped."""
        names = [
            {name for name in piece.chunk.arrays if name.startswith(NUMBER)}
            for piece in self.pieces
            if piece.used
        ]
        if any(own != names[0] for own in names):
            raise ValueError(f"chunks have other numbers: {names}")
        found = {}
        for name in (x for x in self.pieces[0].chunk.arrays if x in names[0]):
            is_list = name.removeprefix(NUMBER) in OF_ANSWERS
            values = self._each(name, of_completions=is_list)
            table = _table(values, counts, most) if is_list else values
            found[name.removeprefix(NUMBER)] = table
        if self.flips.any():
            other = exchanged(found)
            found = {k: np.where(self.flips, other[k], x) for k, x in found.items()}
        return {name: x.astype(np.float32) for name, x in found.items()}

    @property
    def _refused(self) -> np.ndarray:
        """Bool [N]; see `Piece.refused`."""
        return np.concatenate([piece.refused for piece in self.pieces])

    @property
    def _ids(self) -> np.ndarray:
        """See `PreferenceDataset.ids`."""
        contents = self._each("content")
        occurrences = _occurrences(contents)
        width = len(_id(0, int(occurrences.max(initial=0))))
        ids = np.empty(len(contents), f"<U{width}")
        for start in range(0, len(ids), 1 << 16):  # few texts at a time
            part = slice(start, start + (1 << 16))
            pairs = zip(contents[part].tolist(), occurrences[part].tolist())
            ids[part] = [_id(*pair) for pair in pairs]
        return ids

    def _of_tokens(
        self, name: str, dtype: Any, mask: np.ndarray, total: int
    ) -> np.ndarray:
        """An array of the tokens of some pairs, with flipped answers swapped."""
        values, end, first = np.empty(total, dtype), 0, 0
        for piece in self.pieces:
            own = slice(first, first + piece.used)
            part = of_tokens(piece, name, mask[own], self.flips[own])
            values[end : end + len(part)] = part
            end, first = end + len(part), own.stop
        return values


def _annotators(piece: Piece, names: dict[str, int]) -> np.ndarray:
    """The annotator of each pair, as indices into `names`, which get further ones."""
    own = [names.setdefault(x, len(names)) for x in piece.chunk.about["annotators"]]
    return np.array([*own, -1], np.int32)[piece.of_pairs("annotator")]


def _drawn(
    piece: Piece,
    source: Divisible,
    noise: Noise,
    hold: np.ndarray,
    occurrences: np.ndarray,
    names: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Annotators and flips with injected noise; adds new annotators to `names`."""
    chunk = piece.chunk
    own, values, parts = (chunk.about[x] for x in ("annotators", "values", "parts"))
    annotators, flips = _annotators(piece, names), np.zeros(piece.used, np.bool_)
    ends = np.cumsum(chunk["counts"])
    of_record = np.searchsorted(chunk["records"], chunk["record"])
    for n in np.flatnonzero(~hold).tolist():
        place = source.row_location(piece.first_row + int(chunk["row"][n]))
        characters = chunk["characters"][ends[n] - chunk["counts"][n] : ends[n]]
        index, record = chunk["annotator"][n], of_record[n]
        pair = Subject(
            annotator=None if index < 0 else own[index],
            characters=tuple(characters.tolist()),
            values=values[n] if values else {},
            matches=bool(chunk["topic"][n]),
        )
        name, flips[n] = noise.label(
            pair,
            _id(int(chunk["contents"][record]), int(occurrences[record])),
            f"{place} {parts[n]}" if parts and parts[n] else place,
        )
        annotators[n] = -1 if name is None else names.setdefault(name, len(names))
    return annotators, flips


def _whole_records(records: np.ndarray, room: int) -> int:
    """How many pairs to use, about `room`, so that those of a record stay together."""
    if len(records) <= room:
        return len(records)
    return int(np.searchsorted(records, records[room - 1], side="right"))


def _occurrences(contents: np.ndarray) -> np.ndarray:
    """How many equal numbers come before each, int64 [N]."""
    order = np.argsort(contents, kind="stable")
    arranged = contents[order]
    is_first = np.concatenate([[True], arranged[1:] != arranged[:-1]])[: len(order)]
    place = np.arange(len(order))
    found = np.empty(len(order), np.int64)
    found[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return found


def _id(content: int, occurrence: int) -> str:
    """An id, from the hash of the content as a signed number."""
    return f"{content & (1 << 64) - 1:016x}-{occurrence}"


def _table(values: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """Numbers of completions as [N, most]; 0 where a completion is missing."""
    table: Any = np.zeros((len(counts), most), values.dtype)
    table[np.arange(most) < counts[:, None]] = values
    return table
