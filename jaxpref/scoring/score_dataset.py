"""Log-probs of every pair of a set under fixed parameters."""

import contextlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpref.data import PreferenceDataset
from jaxpref.data.batch import PreferenceBatch
from jaxpref.objectives.objective import Objective
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring.scores import ScoreFunction
from jaxpref.sharding import replicated


def make_score_step(scores: ScoreFunction) -> Callable:
    """The jitted `(params, batch, reference) -> (scores, pairs [A, R, S])`.

    It maps over the same micro-batches as the train step, so that both run the same
    kernels on the same shapes and a loss of their difference starts at its known value.
    """

    def score_step(params, batch, reference=None):
        of_micro = lambda micro: scores(params, micro, reference)
        out = jax.lax.map(of_micro, batch)
        return jax.tree.map(replicated, (out, batch.pairs))

    return jax.jit(score_step)


def score_pairs(
    score_step: Callable,
    params,
    pairs: PreferenceDataset,
    reference=None,
    *,
    eval_batches: Callable[[PreferenceDataset], Iterable[PreferenceBatch]],
    mesh: jax.sharding.Mesh,
    title: str,
    bar: tqdm | None = None,
) -> dict[str, np.ndarray]:
    """Scores a whole set.

    Args:
      score_step: from `make_score_step`.
      params: the model's parameters.
      pairs: N pairs of K sides.
      reference: the reference's parameters, where the scores need them.
      eval_batches: every pair once, as a layout's `eval_batches`.
      mesh: the mesh the batches are placed on.
      title: shown at the progress bar.
      bar: of a larger set that these pairs are a part of, in place of one of their own.

    Returns:
      float32 [N, K] by name; whole tables on every process.
    """
    shape = (len(pairs), pairs.num_completions)
    tables = {}
    seen = np.zeros(shape[0], bool)
    own = progress_bar(shape[0], title) if bar is None else contextlib.nullcontext(bar)
    with own as bar:
        for batch in eval_batches(pairs):
            batch = to_global(batch, mesh)
            scores, index = jax.device_get(score_step(params, batch, reference))
            real = index >= 0
            for name, values in scores.items():
                table = tables.setdefault(name, np.full(shape, np.nan, np.float32))
                table[index[real]] = values[real]
            seen[index[real]] = True
            bar.update(int(real.sum()))
            beat(f"{int(seen.sum())} pairs of {title}")
    if not seen.all():
        raise RuntimeError(f"{title}: {int((~seen).sum())} pairs were never scored")
    return tables


def progress_bar(total: int, title: str) -> tqdm:
    """The bar of a set of pairs that is scored, on the first process."""
    return tqdm(
        total=total,
        desc=title,
        unit="pair",
        leave=False,
        # Only for a terminal: in a log these short bars would hide the rest.
        disable=None if jax.process_index() == 0 else True,
    )


def evaluation_metrics(
    objective: Objective,
    scores: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    pairs: PreferenceDataset,
    state,
) -> dict[str, float]:
    """Metrics of a scored set under `eval_` names; the set is one batch to the loss.

    Args:
      objective: what the run makes small.
      scores: float32 [N, K] by name, of the trained model.
      reference: float32 [N, K] by name, of the reference.
      pairs: the set's N pairs.
      state: the objective's state.
    """
    count = len(pairs)
    no_tokens = np.zeros((count, 1, 0), np.int32)
    batch = PreferenceBatch(
        tokens=no_tokens,
        lengths=no_tokens[..., 0:0],
        predictors=no_tokens,
        targets=no_tokens,
        completions=no_tokens,
        pairs=np.arange(count, dtype=np.int32)[:, None],
        completion_lengths=pairs.completion_lengths[:, None, : objective.sides],
        reference={name: table[:, None] for name, table in reference.items()},
        flips=pairs.columns["is_flipped"][:, None],
        annotators=pairs.columns["annotator"][:, None],
        empty=pairs.columns["empty_trace"][:, None],
        weights=np.ones((count, 1), np.float32),
        labels={name: values[:, None] for name, values in pairs.labels.items()},
    )
    scores = {name: table[:, None] for name, table in scores.items()}
    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    losses = objective.losses(scores, batch, state)
    metrics = {"loss": losses.sum() / objective.count(batch)}
    metrics |= objective.metrics(scores, batch, state)
    return {f"eval_{name}": float(value) for name, value in metrics.items()}
