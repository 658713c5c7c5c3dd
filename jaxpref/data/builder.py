"""Collecting tokenized records into a dataset."""

import types
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data.columns import OF_ANSWERS
from jaxpref.data.dataset import COLUMNS, PreferenceDataset


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
            `COLUMNS` are 0, except `row`, which defaults to the number of pairs so far,
            and `file_row`, which defaults to `row`.
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
        row = columns.get("row", len(self))
        defaults |= {"row": row, "file_row": row}
        defaults |= {"rejected_prompt": columns.get("prompt", 0)}
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
