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
    """The layout with more slots in packed rows.

    They hold as many prompts as fit with answers of the maximum length.  If answers are
    shorter, more of them fit, and fewer rows are computed.
    """
    if not isinstance(layout, data.PackedLayout):
        return layout
    slots = min(layout.batch_size, MORE_SLOTS * layout.slots)
    return dataclasses.replace(layout, slots=slots)


def batch_of(
    groups: Sequence[Group],
    rewards: Float[np.ndarray, "B K"],
    train: data.PreferenceDataset,
    layout: data.Layout,
) -> tuple[data.PreferenceBatch, Int32[np.ndarray, "A R S"]]:
    """The batch of B prompts with K answers each, on the host.

    And for each of its slots, the place of the prompt in `groups`; -1 for none.

    Args:
      groups: the prompts and their answers.
      rewards: the rewards of the answers; NaN for none.
      train: all prompts.
      layout: how they become rows.
    """
    builder = data.DatasetBuilder(rewards.shape[1])
    for group, own in zip(groups, rewards.tolist(), strict=True):
        builder.add(
            train.prompt(group.index),
            [answer.tokens for answer in group.answers],
            id=str(train.ids[group.index]),
            columns={SAMPLED: own},
        )
    in_order = lambda step, size: np.arange(size)
    batch = next(layout.batches(builder.build(), in_order, threads=0))
    places = np.asarray(batch.pair_index)
    # The last one is that of empty slots, whose place is -1.
    indices = np.array([*(group.index for group in groups), -1], np.int32)
    return dataclasses.replace(batch, pair_index=indices[places]), places
