"""Checks that a dataset fits a model, and that its scores are finite."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float

from jaxpref.data import PreferenceDataset
from jaxpref.errors import InputError
from jaxpref.models import Architecture
from jaxpref.scoring.scores import OF_HEADS, ROUTER


def check_fits(
    sources: Sequence[str],
    dataset: PreferenceDataset,
    model: str,
    architecture: Architecture,
) -> None:
    """Checks that a model has an embedding for every token and for every position.

    XLA silently clamps out-of-range indices, so they must be detected here.

    Args:
      sources: the files of the records, by the column `source`.
      dataset: the records.
      model: the model's folder, for messages.
      architecture: the model's architecture.

    Raises:
      InputError: naming the first row that does not fit.
    """
    if dataset.longest > architecture.max_position_embeddings:
        lengths = dataset.context_lengths + dataset.completion_lengths
        longest = lengths.max(1).argmax()
        raise InputError(
            f"{_place(sources, dataset, longest)}: a sequence of {dataset.longest} "
            f"tokens is longer than the {architecture.max_position_embeddings} "
            f"positions of {model}; lower --max-length"
        )
    outside = np.flatnonzero(dataset.tokens >= architecture.vocab_size)
    if len(outside):
        record = np.searchsorted(dataset.offsets, outside[0], side="right") - 1
        raise InputError(
            f"{_place(sources, dataset, record)}: the tokenizer of {model} produces "
            f"token {dataset.tokens[outside[0]]}, but its embedding has "
            f"{architecture.vocab_size} rows; use the tokenizer that belongs to the "
            "model"
        )


def check_logit_chunk(logit_chunk: int | None, scores: Collection[str]) -> None:
    """Raises InputError for `logit_chunk` if no logits are computed for the scores."""
    if logit_chunk is not None and OF_HEADS & set(scores):
        raise InputError(
            f"--logit-chunk {logit_chunk}: a reward model computes no logits, so "
            "it has no effect; leave it out"
        )


def check_totals(totals: Collection[str], architecture: Architecture) -> None:
    """Raises InputError if a total needs routers and the model has none."""
    if ROUTER in totals and not hasattr(architecture, "num_experts"):
        raise InputError(
            f"--router-balance: a {architecture.family.model_type} model has no "
            "experts; leave it out"
        )


def check_finite(
    sources: Sequence[str],
    dataset: PreferenceDataset,
    model: str,
    scores: Float[np.ndarray, "N K ..."],
) -> None:
    """Raises InputError naming the first row whose scores are not finite."""
    others = tuple(range(1, scores.ndim))
    wrong = np.flatnonzero(~np.isfinite(scores).all(axis=others))
    if len(wrong):
        raise InputError(
            f"{_place(sources, dataset, wrong[0])}: its scores under {model} are "
            f"not finite (rows affected: {len(wrong)}); check the weights, or set "
            "--compute-dtype float32"
        )


def _place(sources: Sequence[str], dataset: PreferenceDataset, record: int) -> str:
    columns = dataset.columns
    return f"{sources[columns['source'][record]]} row {columns['row'][record] + 1}"
