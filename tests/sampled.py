"""Batches of sampled answers, from arrays of their tokens."""

from collections.abc import Mapping

import numpy as np

from jaxpref.data.batch import PreferenceBatch


def padded_answers(
    mask: np.ndarray,
    token_numbers: Mapping[str, np.ndarray],
    rewards: np.ndarray | None = None,
) -> PreferenceBatch:
    """B prompts with K completions of at most T tokens, each a sequence; A = 1.

    Args:
      mask: which tokens exist, bool [B, K, T].
      token_numbers: by name, [B, K, T]; NaN takes the place of those of padding.
      rewards: [B, K], or None.
    """
    prompts, count, _ = mask.shape
    blank = np.zeros((1, prompts, count, 0), np.int32)
    slots = (1, prompts, 1)
    numbers = {}
    if rewards is not None:
        numbers = {"sampled_rewards": rewards.reshape(*slots, count)}
    return PreferenceBatch(
        tokens=blank,
        lengths=np.zeros((1, prompts, count), np.int32),
        predictors=blank,
        targets=np.zeros((1, *mask.shape), np.int32),
        completions=np.where(mask, np.arange(count)[:, None], -1)[None].astype(
            np.int32
        ),
        pair_index=np.arange(prompts).reshape(slots),
        completion_lengths=mask.sum(-1).reshape(*slots, count),
        reference={},
        is_flipped=np.zeros(slots, bool),
        annotator=np.full(slots, -1),
        empty_trace=np.zeros(slots, bool),
        weights=np.ones(slots, np.float32),
        numbers=numbers,
        token_numbers={
            name: np.where(mask, x, np.nan)[None] for name, x in token_numbers.items()
        },
    )
