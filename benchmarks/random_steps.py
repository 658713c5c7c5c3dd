"""Random pairs and a train step, shared by the other benchmarks.

The step is that of training (`jaxpref.train.step.make_train_step`) with DPO and AdamW;
a benchmark may provide its own scores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxpref import data, losses
from jaxpref.data.packing import collate_packed, lengths
from jaxpref.data.pipeline import collate
from jaxpref.models import Model
from jaxpref.scoring.scores import ScoreFunction, make_scores
from jaxpref.train import OptimizerConfig, from_loss
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step


class Step(NamedTuple):
    """A jitted step, and a function from parameters to the initial state."""

    step: Callable
    new_state: Callable


def make_step(model: Model, scores: ScoreFunction | None = None) -> Step:
    """A DPO step with AdamW, on the usual scores unless others are given."""
    optimizer = OptimizerConfig()
    schedule = make_schedule(optimizer, 1000)
    tx = make_optimizer(optimizer, schedule)
    objective = from_loss(losses.dpo)
    step = make_train_step(scores or make_scores(model), objective, tx, schedule)
    return Step(step, functools.partial(init_state, tx=tx, objective=objective))


def random_pairs(sizes: np.ndarray, *, vocab_size: int, seed: int = 0) -> data.Pairs:
    """Pairs of random tokens.

    Args:
      sizes: int [N, 3], the tokens of each prompt, chosen and rejected answer.
      vocab_size: tokens are drawn evenly from 3 to this.
      seed: of the tokens.
    """
    rng = np.random.default_rng(seed)
    builder = data.PairsBuilder(2)
    for n, row in enumerate(sizes):
        prompt, *answers = (rng.integers(3, vocab_size, k).tolist() for k in row)
        builder.add(prompt, answers, id=str(n))
    return builder.build()


def reference_of(pairs: data.Pairs) -> dict[str, np.ndarray]:
    """Stored reference log-probs; zeros take as long as real ones."""
    return {"reference_logps": np.zeros((len(pairs), 2), np.float32)}


def padded_batch(pairs: data.Pairs) -> data.PreferenceBatch:
    """All pairs as one batch, one pair per row."""
    return collate(
        pairs,
        np.arange(len(pairs))[None],
        shape=data.batch_shape(pairs),
        reference=reference_of(pairs),
    )


def packed_batch(pairs: data.Pairs, *, row_length: int) -> data.PreferenceBatch:
    """A batch of packed rows that holds approximately the given number of pairs."""
    shape = data.packed_shape(pairs, row_length=row_length, batch_size=len(pairs))
    batches = data.packed_batches(
        pairs, shape=shape, reference=reference_of(pairs), prefetch=0
    )
    return next(batches)


def pair_a_row_batch(pairs: data.Pairs) -> data.PreferenceBatch:
    """All pairs as one batch of packed rows as long as the longest pair."""
    tokens, _ = lengths(pairs)
    shape = data.packed_shape(
        pairs, row_length=int(tokens.max()), batch_size=len(pairs)
    )
    return collate_packed(
        pairs,
        np.arange(len(pairs))[None, :, None],
        shape=dataclasses.replace(shape, rows=len(pairs), slots=1),
        reference=reference_of(pairs),
    )
