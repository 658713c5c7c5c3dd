"""From sampled answers to the batch of a step."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32

from jaxpref import data
from jaxpref.data.columns import SAMPLED
from jaxpref.online.answers import Group

MORE_SLOTS = 8
"""How many times more prompts a packed row holds if answers are short."""


def with_slots(layout: data.Layout) -> data.Layout:
    """The layout with room for any prompts and answers, and more slots in packed rows.

    The slots hold as many prompts as fit with answers of the maximum length.  If
    answers are shorter, more of them fit, and fewer rows are computed.

    A batch has a row for each prompt.  The rows of the longest answers are not always
    enough: first-fit-decreasing may need more rows for shorter ones.  Micro-batches
    that a step does not need are not computed, but if one would do, the others cost the
    memory of one more gradient.
    """
    if not isinstance(layout, data.PackedLayout):
        return layout
    slots = min(layout.batch_size, MORE_SLOTS * layout.slots)
    accumulation = max(layout.accumulation, -(-layout.batch_size // layout.rows))
    return dataclasses.replace(layout, slots=slots, accumulation=accumulation)


def batch_of(
    groups: Sequence[Group],
    rewards: Float[np.ndarray, "B K"],
    train: data.PreferenceDataset,
    layout: data.Layout,
) -> tuple[data.PreferenceBatch, Int32[np.ndarray, "A R S"]]:
    """The batch of B prompts with K answers each, on the host.

    The answers follow the completions that the data have, such as those of pairs.  And
    for each of its slots, the place of the prompt in `groups`; -1 for none.

    Args:
      groups: the prompts and their answers.
      rewards: the rewards of the answers; NaN for none.
      train: all prompts.
      layout: how they become rows.
    """
    in_order = lambda step, size: np.arange(size)
    dataset = dataset_of(groups, rewards, train)
    batch = next(layout.batches(dataset, in_order, threads=0))
    places = np.asarray(batch.pair_index)
    # The last one is that of empty slots, whose place is -1.
    indices = np.array([*(group.index for group in groups), -1], np.int32)
    return dataclasses.replace(batch, pair_index=indices[places]), places


def dataset_of(
    groups: Sequence[Group],
    rewards: Float[np.ndarray, "B K"],
    prompts: data.PreferenceDataset,
) -> data.PreferenceDataset:
    """The answers as data, with their rewards and the columns of their prompts.

    Args:
      groups: the prompts and up to K answers each; further ones are empty.
      rewards: the rewards of the answers; NaN for none.
      prompts: all prompts, and the completions before the answers, if there are any,
        from `with_answers`.
    """
    own = prompts.take(np.array([group.index for group in groups]))
    given = own.num_completions - rewards.shape[1]
    lengths = own.completion_lengths.copy()
    lengths[:, given:] = 0
    before = own.prompt_lengths + lengths.sum(1)
    tokens, trained = [], []
    for n, group in enumerate(groups):
        answers = [np.array(answer.tokens, np.int32) for answer in group.answers]
        lengths[n, given : given + len(answers)] = [len(x) for x in answers]
        kept = slice(own.offsets[n], own.offsets[n] + before[n])
        tokens += [own.tokens[kept], *answers]
        if own.trained is not None:
            trained += [own.trained[kept], *(np.ones(len(x), bool) for x in answers)]
    none = np.full((len(own), given), np.nan)
    sizes = own.prompt_lengths + lengths.sum(1)
    return dataclasses.replace(
        own,
        tokens=np.concatenate(tokens),
        trained=np.concatenate(trained) if trained else None,
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        completion_lengths=lengths,
        columns=own.columns | {SAMPLED: np.hstack([none, rewards]).astype(np.float32)},
    )
