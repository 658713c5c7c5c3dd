"""Labels as votes: who judges which two texts, and which labels are verified."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxpref.data import PreferenceDataset
from jaxpref.errors import InputError
from jaxpref.evaluate.verdicts import RIGHT, WRONG


@dataclasses.dataclass(frozen=True)
class Votes:
    """The labels of N pairs as votes."""

    annotators: Int[np.ndarray, " votes"]
    """Index into `names`."""
    names: Sequence[str | None]
    """The annotators; None for labels without a name."""
    items: Int[np.ndarray, " votes"]
    """Votes with equal numbers are evidence about each other: they judge the same two
    texts, and their annotators are named."""
    texts: Int[np.ndarray, " votes"]
    """Votes with equal numbers judge the same two texts."""
    orientation: Int[np.ndarray, " votes"]
    """+1 or -1: which of the two texts a vote prefers."""
    answers: Int[np.ndarray, "votes 2"]
    """The answer that a vote prefers, and the other one; equal numbers are the same
    answer to the same prompt."""

    @property
    def annotator_names(self) -> list[str | None]:
        """The name of each vote's annotator."""
        return [self.names[k] for k in self.annotators]


def votes_of(pairs: PreferenceDataset) -> Votes:
    """The votes of a dataset.

    Duplicates of a record without an annotator are not independent votes; each is its
    own item.
    """
    texts, orientation, answers = _numbered(pairs.completion_keys())
    annotators = pairs.columns["annotator"]
    alone = np.where(annotators < 0, np.arange(len(pairs)), -1)
    _, items = np.unique(np.stack([texts, alone], axis=1), axis=0, return_inverse=True)
    unnamed = [None] if (annotators < 0).any() else []
    names = (*pairs.annotator_names, *unnamed)
    return Votes(
        np.where(annotators < 0, len(names) - 1, annotators),
        names,
        items.ravel(),
        texts,
        orientation,
        answers,
    )


def verified(
    pairs: PreferenceDataset, trusted: PreferenceDataset, name: str
) -> np.ndarray:
    """What a file of verified labels says of each label: "right", "wrong" or "".

    Args:
      pairs: N labels.
      trusted: the verified labels.
      name: the name of their file, for messages.

    Raises:
      InputError: if two verified labels contradict each other.
    """
    keys = np.concatenate([pairs.completion_keys(), trusted.completion_keys()])
    texts, orientation, _ = _numbered(keys)
    count, better = len(pairs), {}
    for n in range(len(trusted)):
        item, side = int(texts[count + n]), int(orientation[count + n])
        if better.setdefault(item, side) != side:
            raise InputError(
                f"{name} row {trusted.columns['row'][n] + 1}: contradicts an earlier "
                "row, which prefers the other answer; keep one of them"
            )
    sides = np.array([better.get(int(item), 0) for item in texts[:count]])
    agrees = sides * orientation[:count]
    return np.array([("", RIGHT, WRONG)[k] for k in agrees])


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of pairs of texts, +1 or -1 for the preferred one, numbers of texts."""
    _, ranks = np.unique(keys, return_inverse=True)
    ranks = ranks.reshape(keys.shape)
    _, texts = np.unique(np.sort(ranks, axis=1), axis=0, return_inverse=True)
    return texts.ravel(), np.where(ranks[:, 0] < ranks[:, 1], 1, -1), ranks
