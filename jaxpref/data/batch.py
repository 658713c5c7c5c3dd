"""The batch: the form in which data is passed to a model."""

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

import jax.tree_util
import numpy as np

from jaxpref.data.columns import VOTES
from jaxpref.data.dataset import PreferenceDataset


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """Rows of token sequences and the pairs whose completions they hold.

    Axes: A micro-batches (accumulation), R rows (sharded over `data` and `fsdp`), Q
    sequences in a row, T tokens of a sequence, P predicted tokens of a sequence, S pair
    slots of a row, K completions of a prompt: chosen and rejected; one answer; an
    answer and that of another prompt, for KTO; or a list, the best answer first.

    In the padded layout, a row is one pair: S = 1, Q = K, and sequence q holds the
    prompt of completion q followed by it.  Packed layouts put several pairs into one
    sequence.  Losses and the training loop only see `[A, R, S, K]` log-probabilities,
    so they do not depend on the layout.  A pair is always within one row, so that no
    communication between rows is needed.
    """

    tokens: np.ndarray
    """int32 [A, R, Q, T]; padded on the right with 0."""
    lengths: np.ndarray
    """int32 [A, R, Q]; real tokens of each sequence.  Masks derive from lengths."""
    predictors: np.ndarray
    """int32 [A, R, Q, P]; the position that predicts each target; 0 if unused."""
    targets: np.ndarray
    """int32 [A, R, Q, P]; the tokens that the loss is on, EOS included; 0 if unused."""
    completions: np.ndarray
    """int32 [A, R, Q, P]; `slot * K + side` of each target's owner; -1 if unused."""
    pair_index: np.ndarray
    """int32 [A, R, S]; index of the pair in the dataset; -1 marks an empty slot."""
    completion_lengths: np.ndarray
    """int32 [A, R, S, K]; target tokens of each completion, on which the loss is."""
    reference: dict[str, np.ndarray]
    """By name, float32 [A, R, S, K]: scores of the reference model that were computed
    in advance (`reference_logps`, ...); empty if there are none."""
    is_flipped: np.ndarray
    """bool [A, R, S]; whether the label is known to be flipped."""
    annotator: np.ndarray
    """int32 [A, R, S]; annotator index in the dataset; -1 if unknown."""
    empty_trace: np.ndarray
    """bool [A, R, S]; whether the pair has an empty trace, in a run that mixes such
    pairs with pairs that have traces; False otherwise."""
    weights: np.ndarray
    """float32 [A, R, S]; multiplies the pair's loss; 0 in empty slots."""
    numbers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """By name, float32 [A, R, S]: columns that the loss reads, see `data.columns`; of
    lists, [A, R, S, K].  0 in empty slots.  Empty if no loss reads any."""
    token_numbers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """By name, float32 [A, R, Q, P]: numbers of the target tokens, such as the
    log-probabilities under the parameters that sampled them.  Empty unless answers are
    sampled in training."""
    votes: np.ndarray | None = None
    """int8 [A, R, S, V] if pairs have several votes: 1 for the first answer, -1 for the
    second, 0 where there is no vote.  `is_flipped`, `annotator`, `weights` and
    `numbers` then are [A, R, S, V], each in the order of the vote.  None without such
    pairs."""
    positions: np.ndarray | None = None
    """int32 [A, R, Q, T] of packed rows: each token's position in prompt and answer.
    None in the padded layout, where it is the position in the sequence."""
    source: np.ndarray | None = None
    """int32 [A, R, S]; index of the file of each pair's record, by the dataset's column
    of the same name.  None in batches that come from no dataset."""
    segments: np.ndarray | None = None
    """int32 [A, R, Q, T] of packed rows: (1 + K) * slot + part of each token (0 prompt,
    1 + k completion k, after any prompt of its own), -1 padding.  A completion attends
    to its prompt and itself.
    None in the padded layout, where a token attends to all earlier ones."""

    @property
    def mask(self) -> np.ndarray:
        """Whether each slot holds a pair, bool [A, R, S]."""
        return self.pair_index >= 0

    @property
    def num_parts(self) -> int:
        """1 + K, the parts of a packed pair: the prompt and its completions."""
        return 1 + self.completion_lengths.shape[-1]


def one_batch(
    dataset: PreferenceDataset, reference: Mapping[str, np.ndarray]
) -> PreferenceBatch:
    """A whole dataset that is scored already: a batch of N rows, without tokens.

    Args:
      dataset: N pairs; all of them have weight 1.
      reference: the reference's scores, float32 [N, K] by name.
    """
    none = np.zeros((len(dataset), 1, 0), np.int32)
    fields = slot_fields(dataset, np.arange(len(dataset))[:, None], reference)
    fields["weights"] = np.ones_like(fields["weights"])
    tokens = dict.fromkeys(("tokens", "predictors", "targets", "completions"), none)
    return PreferenceBatch(**tokens, lengths=none, **fields)


def only(batch: PreferenceBatch, where: np.ndarray) -> PreferenceBatch:
    """The batch with empty slots in place of some pairs; all shapes stay the same.

    Args:
      batch: the batch.
      where: which pairs to keep, bool, in the shape of `pair_index`.
    """
    return dataclasses.replace(
        batch,
        pair_index=np.where(where, batch.pair_index, -1),
        completion_lengths=np.where(where[..., None], batch.completion_lengths, 0),
        votes=None
        if batch.votes is None
        else np.where(where[..., None], batch.votes, 0),
    )


class SlotFields(TypedDict):
    """The fields of a batch that every layout fills in the same way."""

    pair_index: np.ndarray
    completion_lengths: np.ndarray
    reference: dict[str, np.ndarray]
    is_flipped: np.ndarray
    annotator: np.ndarray
    empty_trace: np.ndarray
    weights: np.ndarray
    numbers: dict[str, np.ndarray]
    votes: np.ndarray | None
    source: np.ndarray


def slot_fields(
    dataset: PreferenceDataset,
    indices: np.ndarray,
    reference: Mapping[str, np.ndarray] | None,
) -> SlotFields:
    """The fields of a batch with a number for each pair, completion or vote.

    Args:
      dataset: the dataset of the pairs.
      indices: int [A, R, S]; the pair of each slot, -1 for an empty one.
      reference: float32 [N, K] arrays of all pairs by name, or None.
    """
    real = indices >= 0
    where = np.where(real, indices, 0)

    def take(values: np.ndarray, fill: int = 0) -> np.ndarray:
        mask = real.reshape(real.shape + (1,) * (values.ndim - 1))
        return np.where(mask, values[where], np.asarray(fill, values.dtype))

    return {
        "pair_index": indices.astype(np.int32),
        "completion_lengths": take(dataset.target_lengths),
        "reference": {name: take(table) for name, table in (reference or {}).items()},
        "is_flipped": take(dataset.columns["is_flipped"]),
        "annotator": take(dataset.columns["annotator"], -1),
        "empty_trace": take(dataset.columns["empty_trace"]),
        "weights": take(dataset.weights),
        "numbers": {name: take(values) for name, values in dataset.numbers.items()},
        "votes": take(dataset.columns[VOTES]) if VOTES in dataset.columns else None,
        "source": take(dataset.columns["source"]).astype(np.int32),
    }
