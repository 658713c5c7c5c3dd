"""Pairs whose prompts are also answered in training, for `--objective hypo`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.online.options import SamplingOptions
from jaxpref.online.prompts import with_answers
from jaxpref.rewards.answered import Answered
from jaxpref.train.task import Task


def read(
    tokenizer: Any,
    options: data.DataOptions,
    *,
    kind: data.Kind,
    sampling: SamplingOptions,
    **others: Any,
) -> data.Datasets:
    """The pairs, followed by sampled answers of the maximum length, all token 0.

    Prompts are truncated so that each leaves `max_new_tokens` of --max-length.  All
    pairs are trained on.

    Args:
      tokenizer: the model's tokenizer.
      options: how records become training data.
      kind: what is read of each record.
      sampling: how many answers there are, and their maximum length.
      **others: what else `data.read_datasets` reads.

    Raises:
      InputError: as `data.read_datasets`, or if prompts cannot leave enough tokens, or
        the answers of a pair follow different prompts.
    """
    most = options.longest - sampling.max_new_tokens
    if most < 2:
        raise InputError(
            f"--max-new-tokens {sampling.max_new_tokens}: leaves no room for a prompt "
            f"in the {options.longest} tokens of --max-length; give less, or a larger "
            "--max-length"
        )
    options = dataclasses.replace(options, heldout_fraction=0.0)
    if options.max_prompt_length is None:
        options = dataclasses.replace(options, max_prompt_length=most)
    one_by_one = dataclasses.replace(kind, votes=False)
    found = data.read_datasets(tokenizer, options, kind=one_by_one, **others)
    splits = found.splits
    if len(apart := np.flatnonzero(splits.train.side_prompt_lengths.any(1))):
        source, row = (splits.train.columns[x][apart[0]] for x in ("source", "row"))
        raise InputError(
            f"{found.train_sources[source]} row {row + 1}: its answers follow "
            "different prompts, but samples are answers to one; leave such records out"
        )
    splits = dataclasses.replace(splits, train=with_answers(splits.train, sampling))
    return dataclasses.replace(found, splits=splits)


class PairPrompts(Sequence[data.Prompt]):
    """The prompts of the training pairs, in their order; decoded when they are read."""

    def __init__(self, task: Task):
        """Of the training records of a task."""
        self._train = task.datasets.splits.train
        self._files = task.datasets.train_sources
        self._tokenizer = data.load_tokenizer(task.export.source)

    def __len__(self) -> int:
        return len(self._train)

    def __getitem__(self, index: Any) -> Any:
        tokens, columns = self._train.prompt(index).tolist(), self._train.columns
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        place = (
            f"{self._files[columns['source'][index]]} row {columns['row'][index] + 1}"
        )
        return data.Prompt(text, tokens, {}, {}, Example(text, ()), place)


def no_reward(answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
    """The reward of objectives that read none; see `Reward`."""
    return [np.full(len(x.example.completions), np.nan) for x in answered]
