"""Scores of every completion of a dataset under fixed parameters."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from jaxpref.data import PreferenceDataset
from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import visible
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring.features import FeatureScorer
from jaxpref.scoring.micro_batches import skipping_empty
from jaxpref.scoring.scorer import Scorer
from jaxpref.sharding import replicated

ScoreDataset = Callable[..., dict[str, np.ndarray]]
"""`score_dataset` with everything bound except parameters, dataset and title."""


def make_score_step(scorer: Scorer | FeatureScorer) -> Callable:
    """The jitted `(params, frozen, batch) -> (scores, pairs [A, R, S])`.

    It maps over the same micro-batches as the train step.  Both thus run the same
    kernels on the same shapes, and a loss with a reference starts at its known value.
    """

    def score_step(params, frozen, batch):
        @skipping_empty(batch)
        def score(_, micro):
            return None, scorer(params, frozen, micro).scores

        _, scores = jax.lax.scan(score, None, batch)
        return jax.tree.map(replicated, (scores, batch.pair_index))

    return jax.jit(score_step)


def score_dataset(
    score_step: Callable,
    params: Any,
    frozen: Any,
    dataset: PreferenceDataset,
    *,
    eval_batches: Callable[[PreferenceDataset], Iterable[PreferenceBatch]],
    mesh: jax.sharding.Mesh,
    title: str,
    bar: tqdm | None = None,
) -> dict[str, Float[np.ndarray, "N K ..."]]:
    """Scores a whole dataset.

    Args:
      score_step: from `make_score_step`.
      params: the model's parameters.
      frozen: what the scorer reads in addition.
      dataset: N records of K completions.
      eval_batches: makes batches of every record once, as `Layout.eval_batches`.
      mesh: the mesh that the batches are placed on.
      title: title of the progress bar.
      bar: an existing progress bar, if this dataset is part of a larger one.

    Returns:
      float32 [N, K] by name, of vectors [N, K, n]; complete on every process.
    """
    shape = (len(dataset), dataset.num_completions)
    tables, seen = None, np.zeros(shape[0], bool)
    shown = (
        progress_bar(shape[0], title) if bar is None else contextlib.nullcontext(bar)
    )
    with shown as bar:
        for batch in eval_batches(dataset):
            batch = to_global(batch, mesh)
            scores, index = jax.device_get(score_step(params, frozen, batch))
            if tables is None:
                blank = lambda x: np.full(shape + x.shape[4:], np.nan, np.float32)
                tables = jax.tree.map(blank, scores)
            real = index >= 0
            for table, values in zip(jax.tree.leaves(tables), jax.tree.leaves(scores)):
                table[index[real]] = values[real]
            seen[index[real]] = True
            bar.update(int(real.sum()))
            beat(f"{int(seen.sum())} pairs of {title}")
    if not seen.all():
        raise RuntimeError(f"{title}: {int((~seen).sum())} pairs were never scored")
    return tables or {}


def progress_bar(total: int, title: str) -> tqdm:
    """The progress bar of scoring, shown on the first process."""
    return tqdm(
        total=total,
        desc=visible(title),
        unit="pair",
        leave=False,
        # Only in a terminal: in a log, these short bars would hide the rest.
        disable=None if jax.process_index() == 0 else True,
    )
