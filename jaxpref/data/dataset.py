"""Tokenized preference data: flat arrays with random access, and columns by name."""

import dataclasses
import hashlib
import types
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data.labels import LIST_LABELS, WEIGHTS

COLUMNS: dict[str, type[np.generic]] = {
    "is_flipped": np.bool_,
    "annotator": np.int32,
    "row": np.int64,
    "source": np.int16,
    "empty_trace": np.bool_,
    "prompt": np.int64,
}
"""The columns of every dataset, with their dtypes; all others are float32."""
PLACES = ("row", "source", "prompt")
"""Columns that locate a record or follow from its text; the digest leaves them out."""


@dataclasses.dataclass(frozen=True)
class PreferenceDataset:
    """N prompts with K completions each: chosen and rejected, one answer, or a list.

    The tokens of pair n are `tokens[offsets[n]:offsets[n + 1]]`: the prompt once, then
    completion 0, completion 1, and so on.  The prompt begins with BOS if the tokenizer
    has one.  An untruncated completion ends with EOS.  If prompts have different
    numbers of completions, missing ones come last and have length 0.
    """

    tokens: np.ndarray
    """int32 [total]; the tokens of all pairs, concatenated."""
    offsets: np.ndarray
    """int64 [N + 1]; the start of each pair in `tokens`."""
    prompt_lengths: np.ndarray
    """int32 [N]; tokens of the prompt, BOS included."""
    completion_lengths: np.ndarray
    """int32 [N, K]; tokens of each completion, EOS included; 0 if it is missing."""
    ids: np.ndarray
    """str [N]; 16 hexadecimal digits of the content's SHA-256, "-", occurrence."""
    columns: dict[str, np.ndarray]
    """One number per pair, [N] by name:

    `is_flipped`: this label is known to be flipped (injected, or by the file's `flip`);
    `annotator`: index into `annotator_names`, -1 if unknown;
    `row`: index of the record in its source, from 0;
    `source`: index of the file; 1 for the second source of a run that mixes two, made
    without traces;
    `empty_trace`: the pair has an empty trace, in a run that mixes such pairs with
    pairs that have traces;
    `prompt`: a hash of the prompt, see `shared_prompts.prompt_hash`.
    `weights`, if there is one, float32: multiplies the pair's loss in training.
    Any other column is a float32 label, which losses read under its name; see
    `LabelFields`.  Those in `LIST_LABELS` have a number for each completion, [N, K],
    which is 0 where a completion is missing.
    """
    annotator_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_completions(self) -> int:
        """K, the completions of a prompt."""
        return self.completion_lengths.shape[1]

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The columns that losses read, float32 [N] or [N, K] by name."""
        own = {*COLUMNS, WEIGHTS}
        return {name: x for name, x in self.columns.items() if name not in own}

    @property
    def weights(self) -> np.ndarray:
        """What multiplies the loss of each pair in training, float32 [N]."""
        return self.columns.get(WEIGHTS, np.ones(len(self), np.float32))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one completion; 0 if there are no pairs."""
        lengths = self.prompt_lengths[:, None] + self.completion_lengths
        return int(lengths.max(initial=0))

    @property
    def packed_lengths(self) -> np.ndarray:
        """Tokens of each prompt with all its completions, int64 [N]."""
        return np.diff(self.offsets)

    def prompt(self, index: int) -> np.ndarray:
        """The prompt's tokens, int32 [prompt_lengths[index]]."""
        start = self.offsets[index]
        return self.tokens[start : start + self.prompt_lengths[index]]

    def completion(self, index: int, side: int) -> np.ndarray:
        """One completion's tokens, int32 [completion_lengths[index, side]]."""
        lengths = self.completion_lengths[index]
        start = self.offsets[index] + self.prompt_lengths[index] + lengths[:side].sum()
        return self.tokens[start : start + lengths[side]]

    def take(self, indices: np.ndarray) -> "PreferenceDataset":
        """The pairs at `indices`, int [M], in that order."""
        parts = [self.tokens[slice(*self.offsets[i : i + 2])] for i in indices]
        sizes = np.array([len(part) for part in parts], np.int64)
        return dataclasses.replace(
            self,
            tokens=np.concatenate([self.tokens[:0], *parts]),
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            prompt_lengths=self.prompt_lengths[indices],
            completion_lengths=self.completion_lengths[indices],
            ids=self.ids[indices],
            columns={name: x[indices] for name, x in self.columns.items()},
        )

    def widened(self, num_completions: int) -> "PreferenceDataset":
        """The same records with K = `num_completions`; the last ones are missing."""
        more = num_completions - self.num_completions
        pad = lambda x: np.pad(x, ((0, 0), (0, more)))
        return dataclasses.replace(
            self,
            completion_lengths=pad(self.completion_lengths),
            columns={n: pad(x) if x.ndim == 2 else x for n, x in self.columns.items()},
        )

    def completion_keys(self) -> np.ndarray:
        """32 hexadecimal digits of the SHA-256 of prompt and completion; str [N, K].

        The hash is of the tokens.  Another tokenizer, template or length limit changes
        a key only if it changes the tokens.
        """
        keys = []
        for n in range(len(self)):
            prompt = hashlib.sha256(self.prompt(n).tobytes() + b"|")
            for side in range(self.num_completions):
                whole = prompt.copy()
                whole.update(self.completion(n, side).tobytes())
                keys.append(whole.hexdigest()[:32])
        return np.array(keys, np.str_).reshape(len(self), self.num_completions)

    def digest(self) -> str:
        """SHA-256 (hex) of tokens, lengths and columns, without `row` and `source`.

        Two digests are equal only if a run would see the same pairs in the same order.
        """
        digest = hashlib.sha256()
        arrays = {
            "tokens": self.tokens,
            "prompt_lengths": self.prompt_lengths,
            "completion_lengths": self.completion_lengths,
        } | {name: x for name, x in sorted(self.columns.items()) if name not in PLACES}
        for name, values in arrays.items():
            values = np.ascontiguousarray(values)
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(values.data if values.size else b"")
        return digest.hexdigest()


class DatasetBuilder:
    """Collects pairs one by one, with four bytes per token."""

    def __init__(self, num_completions: int | None):
        """None for prompts with any numbers of completions."""
        self._num_completions = num_completions
        self._tokens = array("i")
        self._prompt_lengths, self._completion_lengths = array("i"), array("i")
        self._counts = array("i")
        self._ids: list[str] = []
        self._annotators: list[str | None] = []
        self._columns: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        prompt: Sequence[int] | np.ndarray,
        completions: Sequence[Sequence[int] | np.ndarray],
        *,
        id: str,
        annotator: str | None = None,
        columns: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        """Appends one pair.

        Args:
          prompt: its tokens, at least one.
          completions: the tokens of each completion; empty if it is missing.
          id: see `PreferenceDataset.ids`.
          annotator: the annotator's name.
          columns: the pair's numbers by name, with the same names for all pairs; for
            those in `LIST_LABELS`, one number per completion.  Missing columns of
            `COLUMNS` are 0, except `row`, which defaults to the number of pairs so far.
        """
        if self._num_completions not in (None, len(completions)):
            raise ValueError(
                f"{len(completions)} completions, not {self._num_completions}"
            )
        if not len(prompt):
            raise ValueError("a prompt without tokens: nothing predicts the completion")
        defaults: dict[str, Any] = {name: 0 for name in COLUMNS if name != "annotator"}
        numbers = {**defaults, "row": len(self), **columns}
        if len(self) and numbers.keys() != self._columns.keys():
            raise ValueError(f"columns {[*numbers]}, not {[*self._columns]}")
        for name, value in numbers.items():
            column = self._columns.setdefault(
                name, array("q" if name in COLUMNS else "f")
            )
            if name in LIST_LABELS:
                if len(value) != len(completions):
                    raise ValueError(f"{name}: {len(value)} of {len(completions)}")
                column.extend(value)
            else:
                column.append(value)
        self._tokens.extend(prompt)
        self._prompt_lengths.append(len(prompt))
        self._counts.append(len(completions))
        for completion in completions:
            self._tokens.extend(completion)
            self._completion_lengths.append(len(completion))
        self._ids.append(id)
        self._annotators.append(annotator)

    def annotators(self) -> set[str]:
        """The names of all annotators so far."""
        return {name for name in self._annotators if name is not None}

    @property
    def most_completions(self) -> int:
        """K: the given number of completions, or the largest so far."""
        return self._num_completions or max(self._counts, default=0)

    def build(
        self,
        annotator_names: Sequence[str] | None = None,
        num_completions: int | None = None,
    ) -> PreferenceDataset:
        """The dataset.

        Args:
          annotator_names: defaults to all names so far, sorted.
          num_completions: K, at least `most_completions`, its default.
        """
        names = annotator_names
        names = tuple(sorted(self.annotators()) if names is None else names)
        index = {name: n for n, name in enumerate(names)} | {None: -1}
        prompt_lengths = np.array(self._prompt_lengths, np.int32)
        # Missing completions come last.
        count = self.most_completions if num_completions is None else num_completions
        exists = np.arange(count) < np.array(self._counts, np.int32)[:, None]

        def of_completions(values: Sequence, dtype: Any) -> np.ndarray:
            table = np.zeros(exists.shape, dtype)
            table[exists] = values
            return table

        completion_lengths = of_completions(self._completion_lengths, np.int32)
        sizes = prompt_lengths + completion_lengths.sum(1, dtype=np.int64)
        collected = dict.fromkeys(COLUMNS, []) | self._columns
        collected["annotator"] = [index[name] for name in self._annotators]
        return PreferenceDataset(
            tokens=np.array(self._tokens, np.int32),
            offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
            prompt_lengths=prompt_lengths,
            completion_lengths=completion_lengths,
            ids=np.array(self._ids, np.str_),
            columns={
                name: of_completions(values, np.float32)
                if name in LIST_LABELS
                else np.array(values, COLUMNS.get(name, np.float32))
                for name, values in collected.items()
            },
            annotator_names=names,
        )
