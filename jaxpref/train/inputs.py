"""What a run reads, checked against its model before anything is computed."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import Pairs
from jaxpref.errors import InputError
from jaxpref.models import Architecture
from jaxpref.train.config import TrainConfig


def read_plan(config: TrainConfig, tokenizer) -> data.Plan:
    """The pairs of the run; `eval_data` takes the place of a held-out share.

    Raises:
      InputError: if a record is wrong, or no pair is left to train on.
    """
    sides = config.objective.sides
    make = make_train = functools.partial(data.make_plan, sides=sides)
    if config.mix is not None:
        make = make_train = data.make_mixed_plan
        if config.mix.empty_data:
            empty = data.open_source(config.mix.empty_data)
            make_train = functools.partial(make, empty=empty)
    if config.eval_data is None:
        plan = make_train(data.open_source(config.data), tokenizer, config.options)
    else:
        whole = dataclasses.replace(config.options, heldout_fraction=0.0)
        clean = whole.without_noise()
        plan = make_train(data.open_source(config.data), tokenizer, whole)
        held = make(data.open_source(config.eval_data), tokenizer, clean)
        digest = plan.digest + held.digest
        plan = dataclasses.replace(plan, heldout=held.train, digest=digest)
    if not len(plan.train):
        raise InputError(
            f"{config.data}: no pair is left to train on ({plan.describe()}); lower "
            "--heldout-fraction"
        )
    if jax.process_index() == 0:
        print(f"{' and '.join(config.sources)}: {plan.describe()}", flush=True)
    return plan


def check_fits(
    sources: Sequence[str], pairs: Pairs, model: str, config: Architecture
) -> None:
    """Whether a model has an embedding for every token and a place for every position.

    XLA clamps an index out of range without a word, so it must be found here.

    Args:
      sources: where the pairs come from, by `Pairs.sources`.
      pairs: the pairs.
      model: the model's folder, for messages.
      config: the model's.

    Raises:
      InputError: naming the first row that does not fit.
    """
    if pairs.longest > config.max_position_embeddings:
        raise InputError(
            f"{_place(sources, pairs, _longest(pairs))}: a sequence of {pairs.longest} "
            f"tokens is longer than the {config.max_position_embeddings} positions of "
            f"{model}; lower --max-length"
        )
    outside = np.flatnonzero(pairs.tokens >= config.vocab_size)
    if len(outside):
        pair = np.searchsorted(pairs.offsets, outside[0], side="right") - 1
        raise InputError(
            f"{_place(sources, pairs, pair)}: the tokenizer of {model} gives "
            f"token {pairs.tokens[outside[0]]}, but its embedding has "
            f"{config.vocab_size} rows; use the tokenizer that belongs to the model"
        )


def check_finite(
    sources: Sequence[str], pairs: Pairs, model: str, scores: np.ndarray
) -> None:
    """Raises InputError naming the first row whose scores [N, K] are not finite."""
    wrong = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(wrong):
        raise InputError(
            f"{_place(sources, pairs, wrong[0])}: its scores under {model} are "
            f"not finite ({len(wrong)} such rows); check the weights, or set "
            "--compute-dtype float32"
        )


def _longest(pairs: Pairs) -> int:
    return int((pairs.prompt_lengths + pairs.completion_lengths.max(1)).argmax())


def _place(sources: Sequence[str], pairs: Pairs, pair: int) -> str:
    return f"{sources[pairs.sources[pair]]} row {pairs.rows[pair] + 1}"
