"""Tokenized preference data: flat arrays with random access, and columns by name."""

import dataclasses
import functools
import hashlib

import numpy as np

from jaxpref.data.columns import VOTES, WEIGHT

COLUMNS: dict[str, type[np.generic]] = {
    "is_flipped": np.bool_,
    "annotator": np.int32,
    "row": np.int64,
    "file_row": np.int64,
    "source": np.int16,
    "empty_trace": np.bool_,
    "prompt": np.int64,
    "rejected_prompt": np.int64,
}
"""The columns of every dataset, with their dtypes; all others are float32."""
PROMPTS = ("prompt", "rejected_prompt")
"""Columns with hashes of the prompts of a record."""
PLACES = ("row", "file_row", "source", *PROMPTS)
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
    `file_row`: index of the row that holds it; one of votes holds several records;
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

    If pairs have several votes, there is a column `votes`, and the columns with a
    number for each label are [N, V]; see `data.votes`.
    """
    annotator_names: tuple[str, ...] = ()
    trained: np.ndarray | None = None
    """bool [total]; whether the loss is on a token of a completion, for completions of
    several turns: False for the turns of the user and of tools between the assistant's.
    None if it is on all tokens of completions."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_completions(self) -> int:
        """K, the completions of a prompt."""
        return self.completion_lengths.shape[1]

    @property
    def num_votes(self) -> int:
        """V, the most votes on a pair; 1 if rows are single labels."""
        return self.columns[VOTES].shape[1] if VOTES in self.columns else 1

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """The columns that losses read, float32 [N] or [N, K] by name."""
        own = {*COLUMNS, VOTES, WEIGHT}
        return {name: x for name, x in self.columns.items() if name not in own}

    @property
    def weights(self) -> np.ndarray:
        """What multiplies the loss of each pair or vote, float32 [N] or [N, V]."""
        blank = np.ones(self.columns["annotator"].shape, np.float32)
        return self.columns.get(WEIGHT, blank)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one completion; 0 if there are no pairs."""
        return int((self.context_lengths + self.completion_lengths).max(initial=0))

    @property
    def context_lengths(self) -> np.ndarray:
        """Tokens of the whole prompt of each completion, int32 [N, K]."""
        return self.prompt_lengths[:, None] + self.side_prompt_lengths

    @functools.cached_property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each completion that the loss is on, int32 [N, K]."""
        if self.trained is None:
            return self.completion_lengths
        before = np.concatenate([[0], np.cumsum(self.trained)])
        sides = self.side_prompt_lengths + self.completion_lengths
        ends = (self.offsets[:-1] + self.prompt_lengths)[:, None] + np.cumsum(sides, 1)
        found = before[ends] - before[ends - self.completion_lengths]
        return found.astype(np.int32)

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

    def targets(self, index: int, side: int) -> np.ndarray:
        """Which tokens of a completion the loss is on, int [target_lengths[n, k]]."""
        size = self.completion_lengths[index, side]
        if self.trained is None:
            return np.arange(size)
        start = self._start(index, side) + self.side_prompt_lengths[index, side]
        return np.flatnonzero(self.trained[start : start + size])

    def _start(self, index: int, side: int) -> int:
        """Where the tokens of one completion and of its own prompt begin."""
        sides = self.side_prompt_lengths[index] + self.completion_lengths[index]
        return self.offsets[index] + self.prompt_lengths[index] + sides[:side].sum()

    def take(self, indices: np.ndarray) -> "PreferenceDataset":
        """The pairs at `indices`, int [M], in that order."""
        indices = np.asarray(indices)
        if indices.dtype == np.bool_:
            indices = np.flatnonzero(indices)
        starts, sizes = self.offsets[:-1][indices], self.packed_lengths[indices]
        of_tokens = lambda x: None if x is None else spans(x, starts, sizes)
        return dataclasses.replace(
            self,
            tokens=spans(self.tokens, starts, sizes),
            trained=of_tokens(self.trained),
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
            trained=None
            if self.trained is None
            else np.insert(self.trained, starts, True),
            offsets=self.offsets + count * np.arange(len(self.offsets)),
            prompt_lengths=self.prompt_lengths + np.int32(count),
        )

    def completion_keys(self) -> np.ndarray:
        """32 hexadecimal digits of the SHA-256 of prompt and completion; str [N, K].

        The hash is of the tokens, and of which of them the loss is on.  Another
        tokenizer, template or length limit changes a key only if it changes these.
        """
        keys = []
        for n in range(len(self)):
            prompt = hashlib.sha256(self.prompt(n).tobytes())
            for side in range(self.num_completions):
                whole = prompt.copy()
                whole.update(self.side_prompt(n, side).tobytes() + b"|")
                whole.update(self.completion(n, side).tobytes())
                if self.target_lengths[n, side] < self.completion_lengths[n, side]:
                    whole.update(b"|" + self.targets(n, side).tobytes())
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
        if self.trained is not None:
            arrays["trained"] = self.trained
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
