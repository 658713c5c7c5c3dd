"""Prompts that are trained on too: a loss then reads log pi(x, y), not log pi(y|x)."""

import dataclasses

import numpy as np

from jaxpref.data.dataset import PreferenceDataset


def with_trained_prompts(dataset: PreferenceDataset) -> PreferenceDataset:
    """The dataset in which each completion begins with its prompt.

    Nothing predicts the first token of a prompt, which is BOS for most tokenizers.  It
    alone remains the prompt: shared if it is the same for all completions.

    Args:
      dataset: N records of K completions.

    Returns:
      The same N records in order; a completion that is missing remains so.
    """
    shared = np.zeros(len(dataset), np.int32)
    lengths = dataset.context_lengths + dataset.completion_lengths
    exists = dataset.completion_lengths > 0
    lengths = np.where(exists, lengths, 0)
    parts: list[np.ndarray] = [dataset.tokens[:0]]
    for n in range(len(dataset)):
        whole = [
            np.concatenate([dataset.context(n, side), dataset.completion(n, side)])
            for side in np.flatnonzero(exists[n]).tolist()
        ]
        shared[n] = len({int(tokens[0]) for tokens in whole}) == 1
        parts += [whole[0][:1]] * shared[n] + [tokens[shared[n] :] for tokens in whole]
    side = np.where(exists, 1 - shared[:, None], 0).astype(np.int32)
    sizes = shared + (lengths - np.where(exists, shared[:, None], 0)).sum(1)
    return dataclasses.replace(
        dataset,
        tokens=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        prompt_lengths=shared,
        side_prompt_lengths=side,
        completion_lengths=np.where(exists, lengths - 1, 0).astype(np.int32),
    )
