"""Tokenised pairs: flat arrays with random access, and the static shape they need."""

import dataclasses
import hashlib
import types
from array import array
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pairs:
    """N prompts with K completions each (K = 2 chosen and rejected, K = 1 for SFT).

    Tokens of pair n lie in `tokens[offsets[n]:offsets[n + 1]]`: the prompt once, then
    completion 0, then completion 1.  The prompt begins with BOS where the tokenizer has
    one; an untruncated completion ends with EOS.
    """

    tokens: np.ndarray
    """int32 [total]; all pairs one after the other."""
    offsets: np.ndarray
    """int64 [N + 1]; where each pair begins in `tokens`."""
    prompt_lengths: np.ndarray
    """int32 [N]; tokens of the prompt, BOS included."""
    completion_lengths: np.ndarray
    """int32 [N, K]; tokens of each completion, EOS included."""
    ids: np.ndarray
    """str [N]; 16 hexadecimal digits of the content's SHA-256, "-", occurrence."""
    flips: np.ndarray
    """bool [N]; this label is known to be flipped (by us or by the file's `flip`)."""
    annotators: np.ndarray
    """int32 [N]; index into `annotator_names`; -1 if unknown."""
    rows: np.ndarray
    """int64 [N]; index of the record in its source, from 0."""
    empty: np.ndarray
    """bool [N]; this pair has an empty trace, in a run that mixes such pairs with pairs
    that have traces; False everywhere else."""
    sources: np.ndarray
    """int8 [N]; which source the record is in: 1 is the second one of a run that mixes
    two, made without traces; 0 everywhere else."""
    annotator_names: tuple[str, ...] = ()
    labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """By the loss's name, float32 [N]: numbers of the records; see `LabelFields`."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_sides(self) -> int:
        """K, the completions of a prompt."""
        return self.completion_lengths.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with a completion; 0 if there are no pairs."""
        lengths = self.prompt_lengths[:, None] + self.completion_lengths
        return int(lengths.max(initial=0))

    def prompt(self, index: int) -> np.ndarray:
        """The prompt's tokens, int32 [prompt_lengths[index]]."""
        start = self.offsets[index]
        return self.tokens[start : start + self.prompt_lengths[index]]

    def completion(self, index: int, side: int) -> np.ndarray:
        """One completion's tokens, int32 [completion_lengths[index, side]]."""
        lengths = self.completion_lengths[index]
        start = self.offsets[index] + self.prompt_lengths[index] + lengths[:side].sum()
        return self.tokens[start : start + lengths[side]]

    def take(self, indices: np.ndarray) -> "Pairs":
        """The pairs of `indices`, int [M], in that order."""
        parts = [self.tokens[slice(*self.offsets[i : i + 2])] for i in indices]
        sizes = np.array([len(part) for part in parts], np.int64)
        fields = "prompt_lengths completion_lengths ids flips annotators rows empty"
        taken = {f: getattr(self, f)[indices] for f in f"{fields} sources".split()}
        return dataclasses.replace(
            self,
            tokens=np.concatenate([self.tokens[:0], *parts]),
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            labels={name: values[indices] for name, values in self.labels.items()},
            **taken,
        )

    def completion_keys(self) -> np.ndarray:
        """32 hexadecimal digits of the SHA-256 of prompt and completion; str [N, K].

        Of the tokens: another tokenizer, template or length limit shows itself where it
        changes them, and only there.
        """
        keys = []
        for n in range(len(self)):
            prompt = hashlib.sha256(self.prompt(n).tobytes() + b"|")
            for side in range(self.num_sides):
                whole = prompt.copy()
                whole.update(self.completion(n, side).tobytes())
                keys.append(whole.hexdigest()[:32])
        return np.array(keys, np.str_).reshape(len(self), self.num_sides)

    def digest(self) -> str:
        """SHA-256 (hex) of tokens, lengths, flips, annotators, labels, empty traces.

        Equal exactly where a run would see the same pairs in the same order; names,
        and where the pairs stand in their file, are left out.
        """
        digest = hashlib.sha256()
        names = "tokens prompt_lengths completion_lengths flips annotators".split()
        # Only where there are any: pairs without traces keep the digest they had.
        for name in names + ["empty"] * bool(self.empty.any()):
            array = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.data if array.size else b"")
        for name, values in sorted(self.labels.items()):
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(values.tobytes())
        return digest.hexdigest()


class PairsBuilder:
    """Collects pairs one by one at four bytes a token."""

    def __init__(self, num_sides: int):
        self._num_sides = num_sides
        self._tokens = array("i")
        self._prompt_lengths, self._completion_lengths = array("i"), array("i")
        self._rows, self._flips = array("q"), array("b")
        self._empty, self._sources = array("b"), array("b")
        self._ids: list[str] = []
        self._annotators: list[str | None] = []
        self._labels: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        *,
        id: str,
        flip: bool = False,
        annotator: str | None = None,
        row: int | None = None,
        labels: Mapping[str, float] = types.MappingProxyType({}),
        empty: bool = False,
        source: int = 0,
    ) -> None:
        """Append one pair; the row defaults to the number of pairs before it."""
        if len(completions) != self._num_sides:
            raise ValueError(f"{len(completions)} completions, not {self._num_sides}")
        if not len(prompt):
            raise ValueError("a prompt without tokens: nothing predicts what follows")
        if len(self) and labels.keys() != self._labels.keys():
            raise ValueError(f"labels {[*labels]}, not {[*self._labels]}")
        for name, value in labels.items():
            self._labels.setdefault(name, array("f")).append(value)
        self._rows.append(len(self) if row is None else row)
        self._tokens.extend(prompt)
        self._prompt_lengths.append(len(prompt))
        for completion in completions:
            self._tokens.extend(completion)
            self._completion_lengths.append(len(completion))
        self._ids.append(id)
        self._flips.append(flip)
        self._empty.append(empty)
        self._sources.append(source)
        self._annotators.append(annotator)

    def annotators(self) -> set[str]:
        """The names that occur."""
        return {name for name in self._annotators if name is not None}

    def build(self, annotator_names: Sequence[str] | None = None) -> Pairs:
        """The pairs; `annotator_names` default to those that occur, sorted."""
        names = annotator_names
        names = tuple(sorted(self.annotators()) if names is None else names)
        index = {name: n for n, name in enumerate(names)}
        prompt_lengths = np.array(self._prompt_lengths, np.int32)
        completion_lengths = np.array(self._completion_lengths, np.int32)
        completion_lengths = completion_lengths.reshape(len(self), self._num_sides)
        sizes = prompt_lengths + completion_lengths.sum(1, dtype=np.int64)
        return Pairs(
            tokens=np.array(self._tokens, np.int32),
            offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
            prompt_lengths=prompt_lengths,
            completion_lengths=completion_lengths,
            ids=np.array(self._ids, np.str_),
            flips=np.array(self._flips, bool),
            annotators=np.array(
                [-1 if name is None else index[name] for name in self._annotators],
                np.int32,
            ),
            rows=np.array(self._rows, np.int64),
            empty=np.array(self._empty, bool),
            sources=np.array(self._sources, np.int8),
            annotator_names=names,
            labels={k: np.array(v, np.float32) for k, v in self._labels.items()},
        )


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static sizes of a row: every batch of a run has them, so a step compiles once."""

    sequence_length: int
    """T, tokens of a sequence."""
    predictions: int
    """P, predicted tokens of a sequence."""
    sides: int
    """K, completions of a pair; in the padded layout also Q, sequences of a row."""


def batch_shape(
    *pairs: Pairs, length_multiple: int = 8, prediction_multiple: int = 8
) -> BatchShape:
    """The smallest shape that holds every sequence of `pairs`, rounded up.

    Args:
      *pairs: all the pairs a run will see (train and held-out).
      length_multiple: T is a multiple of this.
      prediction_multiple: P is a multiple of this.
    """
    filled = [p for p in pairs if len(p)]
    sides = {p.num_sides for p in filled}
    if len(sides) != 1:
        raise ValueError(f"pairs of one run have one K and at least one row: {sides}")
    longest = max(p.longest for p in filled)
    answer = max(int(p.completion_lengths.max()) for p in filled)
    (num_sides,) = sides
    return BatchShape(
        sequence_length=-(-longest // length_multiple) * length_multiple,
        predictions=-(-answer // prediction_multiple) * prediction_multiple,
        sides=num_sides,
    )
