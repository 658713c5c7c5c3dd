"""Random pairs and a train step, shared by the other benchmarks.

The step is that of training (`jaxpref.train.step.make_train_step`) with DPO and AdamW;
a benchmark may provide its own scorer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxpref import data, losses
from jaxpref.models import Model
from jaxpref.objectives import from_loss
from jaxpref.scoring import Scorer, make_scorer
from jaxpref.train import OptimizerConfig
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step


class Step(NamedTuple):
    """A jitted step, and a function from parameters to the initial state."""

    step: Callable
    new_state: Callable


def make_step(model: Model, scorer: Scorer | None = None) -> Step:
    """A DPO step with AdamW, by default with the scorer of training."""
    optimizer = OptimizerConfig()
    schedule = make_schedule(optimizer, 1000)
    tx = make_optimizer(optimizer, schedule)
    objective = from_loss(losses.dpo)
    if scorer is None:
        scorer = make_scorer(model, objective.scores)
    step = make_train_step(scorer, objective, tx, schedule)
    return Step(step, functools.partial(init_state, tx=tx, objective=objective))


def random_pairs(
    sizes: np.ndarray, *, vocab_size: int, seed: int = 0
) -> data.PreferenceDataset:
    """Pairs of random tokens.

    Args:
      sizes: int [N, 3], tokens of each prompt, chosen answer, and rejected answer.
      vocab_size: tokens are drawn uniformly from 3 up to this.
      seed: seed of the tokens.
    """
    rng = np.random.default_rng(seed)
    builder = data.DatasetBuilder(2)
    for n, row in enumerate(sizes):
        prompt, *answers = (rng.integers(3, vocab_size, k).tolist() for k in row)
        builder.add(prompt, answers, id=str(n))
    return builder.build()


def reference_of(pairs: data.PreferenceDataset) -> dict[str, np.ndarray]:
    """Stored reference log-probs; zeros take as long as real ones."""
    return {"reference_logps": np.zeros((len(pairs), 2), np.float32)}


def padded_batch(pairs: data.PreferenceDataset) -> data.PreferenceBatch:
    """All pairs as one batch, one pair per row."""
    layout = data.padded_layout(pairs, batch_size=len(pairs))
    whole = np.arange(len(pairs))[None]
    return layout.collate(pairs, whole, reference=reference_of(pairs))


def packed_batch(
    pairs: data.PreferenceDataset, *, row_length: int
) -> data.PreferenceBatch:
    """A batch of packed rows that holds all the pairs."""
    order, reference = data.uniform(pairs, 0), reference_of(pairs)
    layout = data.packed_layout(
        pairs,
        order=order,
        row_length=row_length,
        batch_size=len(pairs),
        num_steps=1,
        tokens_per_device=len(pairs) * row_length,
    )
    return next(layout.batches(pairs, order, reference=reference, threads=0))


def pair_a_row_batch(pairs: data.PreferenceDataset) -> data.PreferenceBatch:
    """All pairs as one batch of packed rows, one pair each, as long as the longest."""
    longest = int(pairs.packed_lengths.max())
    order = data.in_order(pairs)
    layout = data.packed_layout(
        pairs, order=order, row_length=longest, batch_size=len(pairs), num_steps=1
    )
    layout = dataclasses.replace(layout, slots=1)
    whole = np.arange(len(pairs))[None, :, None]
    return layout.collate(pairs, whole, reference=reference_of(pairs))
