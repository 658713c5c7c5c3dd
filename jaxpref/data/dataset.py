"""Tokenized preference data: flat arrays with random access, and columns by name."""

import dataclasses
import hashlib
import types
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data.columns import OF_ANSWERS, WEIGHT

COLUMNS: dict[str, type[np.generic]] = {
    "is_flipped": np.bool_,
    "annotator": np.int32,
    "row": np.int64,
    "source": np.int16,
    "empty_trace": np.bool_,
    "prompt": np.int64,
    "rejected_prompt": np.int64,
}
"""The columns of every dataset, with their dtypes; all others are float32."""
PROMPTS = ("prompt", "rejected_prompt")
"""Columns with hashes of the prompts of a record."""
PLACES = ("row", "source", *PROMPTS)
"""Columns that locate a record or follow from its text; the digest leaves them out."""

_SPANS = 1 << 14


@dataclasses.dataclass(frozen=True)
class PreferenceDataset:
    """N prompts with K completions each: chosen and rejected, one answer, or a list.

    The tokens of pair n are `tokens[offsets[n]:offsets[n + 1]]`: the prompt once, then
    completion 0, completion 1, and so on.  The prompt begins with BOS if the tokenizer
    has one.  An untruncated completion ends with EOS.  If prompts have different
    numbers of completions, missing ones come last and have length 0.

    If completions have prompts of their own, the prompt is what these begin with in
    common, perhaps nothing.  The rest of each is before its completion.
    """

    tokens: np.ndarray
    """int32 [total]; the tokens of all pairs, concatenated."""
    offsets: np.ndarray
    """int64 [N + 1]; the start of each pair in `tokens`."""
    prompt_lengths: np.ndarray
    """int32 [N]; tokens of the prompt that all completions share, BOS included."""
    side_prompt_lengths: np.ndarray
    """int32 [N, K]; further tokens of the prompt of each completion alone."""
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
    `prompt`: a hash of the prompt, see `shared_prompts.prompt_hash`; of the first one
    if completions have prompts of their own;
    `rejected_prompt`: that of the second completion, which may be the same.
    `weight`, if there is one, float32: multiplies the pair's loss in training.
    Any other column is float32, and losses read it under its name; see
    `data.columns`.  Those in `OF_ANSWERS` have a number for each completion, [N, K],
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
        own = {*COLUMNS, WEIGHT}
        return {name: x for name, x in self.columns.items() if name not in own}

    @property
    def weights(self) -> np.ndarray:
        """What multiplies the loss of each pair in training, float32 [N]."""
        return self.columns.get(WEIGHT, np.ones(len(self), np.float32))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one completion; 0 if there are no pairs."""
        return int((self.context_lengths + self.completion_lengths).max(initial=0))

    @property
    def context_lengths(self) -> np.ndarray:
        """Tokens of the whole prompt of each completion, int32 [N, K]."""
        return self.prompt_lengths[:, None] + self.side_prompt_lengths

    @property
    def packed_lengths(self) -> np.ndarray:
        """Tokens of each prompt with all its completions, int64 [N]."""
        return np.diff(self.offsets)

    def prompt(self, index: int) -> np.ndarray:
        """The tokens of the shared prompt, int32 [prompt_lengths[index]]."""
        start = self.offsets[index]
        return self.tokens[start : start + self.prompt_lengths[index]]

    def side_prompt(self, index: int, side: int) -> np.ndarray:
        """What follows it before one completion, int32 [side_prompt_lengths[n, k]]."""
        start = self._start(index, side)
        return self.tokens[start : start + self.side_prompt_lengths[index, side]]

    def context(self, index: int, side: int) -> np.ndarray:
        """The whole prompt of one completion, int32 [context_lengths[index, side]]."""
        return np.concatenate([self.prompt(index), self.side_prompt(index, side)])

    def completion(self, index: int, side: int) -> np.ndarray:
        """One completion's tokens, int32 [completion_lengths[index, side]]."""
        start = self._start(index, side) + self.side_prompt_lengths[index, side]
        return self.tokens[start : start + self.completion_lengths[index, side]]

    def _start(self, index: int, side: int) -> int:
        """Where the tokens of one completion and of its own prompt begin."""
        sides = self.side_prompt_lengths[index] + self.completion_lengths[index]
        return self.offsets[index] + self.prompt_lengths[index] + sides[:side].sum()

    def take(self, indices: np.ndarray) -> "PreferenceDataset":
        """The pairs at `indices`, int [M], in that order."""
        indices = np.asarray(indices)
        if indices.dtype == np.bool_:
            indices = np.flatnonzero(indices)
        sizes = self.packed_lengths[indices]
        return dataclasses.replace(
            self,
            tokens=spans(self.tokens, self.offsets[:-1][indices], sizes),
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            prompt_lengths=self.prompt_lengths[indices],
            side_prompt_lengths=self.side_prompt_lengths[indices],
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
            side_prompt_lengths=pad(self.side_prompt_lengths),
            completion_lengths=pad(self.completion_lengths),
            columns={n: pad(x) if x.ndim == 2 else x for n, x in self.columns.items()},
        )

    def prefixed(self, count: int) -> "PreferenceDataset":
        """The same records with `count` placeholders, token 0, before each prompt."""
        if not count:
            return self
        starts = np.repeat(self.offsets[:-1], count)
        return dataclasses.replace(
            self,
            tokens=np.insert(self.tokens, starts, 0),
            offsets=self.offsets + count * np.arange(len(self.offsets)),
            prompt_lengths=self.prompt_lengths + np.int32(count),
        )

    def completion_keys(self) -> np.ndarray:
        """32 hexadecimal digits of the SHA-256 of prompt and completion; str [N, K].

        The hash is of the tokens.  Another tokenizer, template or length limit changes
        a key only if it changes the tokens.
        """
        keys = []
        for n in range(len(self)):
            prompt = hashlib.sha256(self.prompt(n).tobytes())
            for side in range(self.num_completions):
                whole = prompt.copy()
                whole.update(self.side_prompt(n, side).tobytes() + b"|")
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
        }
        if self.side_prompt_lengths.any():
            arrays["side_prompt_lengths"] = self.side_prompt_lengths
        columns = sorted(self.columns.items())
        arrays |= {name: x for name, x in columns if name not in PLACES}
        for name, values in arrays.items():
            values = np.ascontiguousarray(values)
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(values.data if values.size else b"")
        return digest.hexdigest()


def spans(tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Spans of tokens, one after the other.

    Args:
      tokens: [total].
      starts: int [N], where each span begins.
      sizes: int [N], the tokens of each.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    found = np.empty(int(ends[-1]) if len(ends) else 0, tokens.dtype)
    for first in range(0, len(sizes), _SPANS):  # the indices take memory, too
        part = slice(first, first + _SPANS)
        begin = ends[part] - sizes[part]
        place = np.arange(begin[0], ends[part][-1])
        place += np.repeat(starts[part] - begin, sizes[part])
        found[begin[0] : ends[part][-1]] = tokens[place]
    return found


class DatasetBuilder:
    """Collects pairs one by one, with four bytes per token."""

    def __init__(self, num_completions: int | None):
        """None for prompts with any numbers of completions."""
        self._num_completions = num_completions
        self._tokens = array("i")
        self._prompt_lengths, self._completion_lengths = array("i"), array("i")
        self._side_prompt_lengths = array("i")
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
        side_prompts: Sequence[Sequence[int] | np.ndarray] = (),
        id: str,
        annotator: str | None = None,
        columns: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        """Appends one pair.

        Args:
          prompt: its tokens, at least one, unless all completions have their own.
          completions: the tokens of each completion; empty if it is missing.
          side_prompts: further tokens of the prompt of each completion.
          id: see `PreferenceDataset.ids`.
          annotator: the annotator's name.
          columns: the pair's numbers by name, with the same names for all pairs; for
            those in `OF_ANSWERS`, one number per completion.  Missing columns of
            `COLUMNS` are 0, except `row`, which defaults to the number of pairs so far.
        """
        if self._num_completions not in (None, len(completions)):
            raise ValueError(
                f"{len(completions)} completions, not {self._num_completions}"
            )
        own = side_prompts or [()] * len(completions)
        whole = zip(own, completions, strict=True)
        if not len(prompt) and any(len(x) and not len(p) for p, x in whole):
            raise ValueError("a prompt without tokens: nothing predicts the completion")
        defaults: dict[str, Any] = {name: 0 for name in COLUMNS if name != "annotator"}
        defaults |= {"row": len(self), "rejected_prompt": columns.get("prompt", 0)}
        numbers = {**defaults, **columns}
        if len(self) and numbers.keys() != self._columns.keys():
            raise ValueError(f"columns {[*numbers]}, not {[*self._columns]}")
        for name, value in numbers.items():
            column = self._columns.setdefault(
                name, array("q" if name in COLUMNS else "f")
            )
            if name in OF_ANSWERS:
                if len(value) != len(completions):
                    raise ValueError(f"{name}: {len(value)} of {len(completions)}")
                column.extend(value)
            else:
                column.append(value)
        self._tokens.extend(prompt)
        self._prompt_lengths.append(len(prompt))
        self._counts.append(len(completions))
        for side_prompt, completion in zip(own, completions):
            self._tokens.extend(side_prompt)
            self._tokens.extend(completion)
            self._side_prompt_lengths.append(len(side_prompt))
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
        side_prompt_lengths = of_completions(self._side_prompt_lengths, np.int32)
        sides = completion_lengths + side_prompt_lengths
        sizes = prompt_lengths + sides.sum(1, dtype=np.int64)
        collected = dict.fromkeys(COLUMNS, []) | self._columns
        collected["annotator"] = [index[name] for name in self._annotators]
        return PreferenceDataset(
            tokens=np.array(self._tokens, np.int32),
            offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
            prompt_lengths=prompt_lengths,
            side_prompt_lengths=side_prompt_lengths,
            completion_lengths=completion_lengths,
            ids=np.array(self._ids, np.str_),
            columns={
                name: of_completions(values, np.float32)
                if name in OF_ANSWERS
                else np.array(values, COLUMNS.get(name, np.float32))
                for name, values in collected.items()
            },
            annotator_names=names,
        )
