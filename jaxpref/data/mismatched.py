"""Answers to other prompts, from which KTO estimates how far the policy has moved.

Each prompt of a dataset gets the answer of another record as one more completion: that
of the next record with another prompt, in an order by the hash of the ids.  So it is
fixed for the run, its score under the reference is computed once, and a batch holds it
in the row of its prompt.
"""

import dataclasses

import numpy as np

from jaxpref.data.dataset import PreferenceDataset, spans
from jaxpref.data.hashing import hash_uniforms
from jaxpref.errors import InputError


def with_mismatched(
    dataset: PreferenceDataset,
    max_length: int,
    *,
    place: str,
    others: PreferenceDataset | None = None,
) -> PreferenceDataset:
    """The dataset with an answer to another prompt as the last completion of each.

    The tokens are those of the answer after its own prompt.  They are cut on the right
    to fit after the new one.

    Args:
      dataset: N prompts with one completion each.
      max_length: maximum tokens of prompt and completion together.
      place: what was read, for errors.
      others: records whose answers are used if the dataset has only one prompt.

    Returns:
      The same N records in order, with two completions.

    Raises:
      InputError: if there is no answer to another prompt.
    """
    donors = next_of_another_prompt(dataset.ids, dataset.columns["prompt"])
    answers = dataset
    if donors is None and others is not None:
        answers = others
        differ = others.columns["prompt"] != dataset.columns["prompt"][0]
        first = np.flatnonzero(differ)[:1]
        donors = np.repeat(first, len(dataset)) if len(first) else None
    if donors is None:
        raise InputError(
            f"{place}: all prompts are the same, but the KL estimate of kto needs "
            "answers to other prompts; use --loss apo_zero_unpaired or bco"
        )
    limits = max_length - dataset.prompt_lengths
    sizes = np.minimum(answers.completion_lengths[donors, 0], limits).astype(np.int32)
    # Both in turn, from one array with the tokens of both.
    own = len(dataset.tokens)
    given = own + answers.offsets[donors] + answers.prompt_lengths[donors]
    starts = np.column_stack([dataset.offsets[:-1], given]).ravel()
    lengths = np.column_stack([dataset.packed_lengths, sizes]).ravel()
    both = lambda x, y: spans(np.concatenate([x, y]), starts, lengths)
    return dataclasses.replace(
        dataset,
        tokens=both(dataset.tokens, answers.tokens),
        trained=None
        if dataset.trained is None or answers.trained is None
        else both(dataset.trained, answers.trained),
        offsets=dataset.offsets + np.concatenate([[0], np.cumsum(sizes)]),
        side_prompt_lengths=np.zeros((len(dataset), 2), np.int32),
        completion_lengths=np.column_stack([dataset.completion_lengths, sizes]),
    )


def next_of_another_prompt(ids: np.ndarray, prompts: np.ndarray) -> np.ndarray | None:
    """The next record with another prompt, in a cyclic order by the hash of the ids.

    Args:
      ids: str [N], without duplicates.
      prompts: int [N]; equal for records with the same prompt.

    Returns:
      int [N]; None if all prompts of N > 0 records are the same.
    """
    if not len(ids):
        return np.zeros(0, np.int64)
    order = np.argsort(hash_uniforms(ids.tolist(), salt="mismatched"), kind="stable")
    arranged = prompts[order]
    # The first of each run of equal prompts, on the circle.
    firsts = np.flatnonzero(arranged != np.roll(arranged, 1))
    if not len(firsts):
        return None
    following = np.searchsorted(firsts, np.arange(len(order)), side="right")
    donors = np.empty(len(order), np.int64)
    donors[order] = order[firsts[following % len(firsts)]]
    return donors
