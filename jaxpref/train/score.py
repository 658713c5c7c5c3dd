"""Log-probs of every pair of a set under fixed parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpref import data
from jaxpref.data import Pairs
from jaxpref.data.batch import PreferenceBatch
from jaxpref.sharding import replicated
from jaxpref.train.mesh import to_global
from jaxpref.train.objective import Objective, PairLogps, reward_metrics


def make_score_step(pair_logps: PairLogps) -> Callable:
    """The jitted `(params, batch) -> (logps [A, R, S, K], pairs [A, R, S])`.

    It maps over the same micro-batches as the train step, so that both run the same
    kernels on the same shapes and a loss of their difference starts at its known value.
    """

    def score_step(params, batch):
        logps = jax.lax.map(lambda micro: pair_logps(params, micro), batch)
        return replicated(logps), replicated(batch.pairs)

    return jax.jit(score_step)


def score_pairs(
    score_step: Callable,
    params,
    pairs: Pairs,
    *,
    split: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    title: str,
) -> np.ndarray:
    """Scores a whole set.

    Args:
      score_step: from `make_score_step`.
      params: the model's parameters.
      pairs: N pairs of K sides.
      split: arguments of `data.eval_batches`: shape, batch size, this process.
      mesh: the mesh the batches are placed on.
      title: shown at the progress bar.

    Returns:
      float32 [N, K]; the whole table on every process.
    """
    shape = (len(pairs), pairs.num_sides)
    table = np.full(shape, np.nan, np.float32)
    seen = np.zeros(shape[0], bool)
    bar = tqdm(
        total=shape[0],
        desc=title,
        unit="pair",
        leave=False,
        # Only for a terminal: in a log these short bars would hide the rest.
        disable=None if jax.process_index() == 0 else True,
    )
    with bar:
        for batch in data.eval_batches(pairs, **split):
            logps, index = map(np.asarray, score_step(params, to_global(batch, mesh)))
            real = index >= 0
            table[index[real]] = logps[real]
            seen[index[real]] = True
            bar.update(int(real.sum()))
    if not seen.all():
        raise RuntimeError(f"{title}: {int((~seen).sum())} pairs were never scored")
    return table


def evaluation_metrics(
    objective: Objective,
    logps: np.ndarray,
    reference_logps: np.ndarray | None,
    pairs: Pairs,
    state,
) -> dict[str, float]:
    """Metrics of a scored set under `eval_` names; the set is one batch to the loss.

    Args:
      objective: what the run makes small.
      logps: float32 [N, K] under the trained model.
      reference_logps: float32 [N, K] under the reference, or None.
      pairs: the set's N pairs.
      state: the objective's state.
    """
    if reference_logps is None:
        reference_logps = np.zeros_like(logps)
    count = len(pairs)
    no_tokens = np.zeros((count, 1, 0), np.int32)
    batch = PreferenceBatch(
        tokens=no_tokens,
        lengths=no_tokens[..., 0:0],
        predictors=no_tokens,
        targets=no_tokens,
        completions=no_tokens,
        pairs=np.arange(count, dtype=np.int32)[:, None],
        completion_lengths=pairs.completion_lengths[:, None, : logps.shape[1]],
        reference_logps=reference_logps[:, None],
        flips=pairs.flips[:, None],
        annotators=pairs.annotators[:, None],
        weights=np.ones((count, 1), np.float32),
    )
    batch, logps = jax.tree.map(jnp.asarray, (batch, logps[:, None]))
    losses = objective.losses(logps, batch, state)
    metrics = {"loss": losses.sum() / objective.count(batch)}
    metrics |= reward_metrics(logps, batch, objective.reads, objective.options)
    return {f"eval_{name}": float(value) for name, value in metrics.items()}
