"""Metrics of held-out pairs during training."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.data import PreferenceDataset
from jaxpref.data.batch import PreferenceBatch, one_batch, only
from jaxpref.objectives.by_vote import by_vote
from jaxpref.objectives.objective import Objective, State
from jaxpref.scoring.scores import Scores

BY_SOURCE = ("loss", "rewards/accuracies", "rewards/margins")
"""Metrics that are reported for each source."""


def make_evaluation(objective: Objective) -> Callable:
    """The jitted `(scores, batch, state) -> metrics` of held-out pairs."""

    def evaluate(
        scores: Scores, batch: PreferenceBatch, state: State
    ) -> dict[str, jax.Array]:
        inputs = by_vote(scores, batch)
        losses, learned = objective.evaluation(inputs, state)
        total = jnp.sum(jnp.where(inputs.is_pair, losses, 0))
        metrics = {"loss": total / objective.count(batch)}
        return metrics | objective.metrics(inputs) | learned

    return jax.jit(evaluate)


def evaluation_metrics(
    evaluate: Callable,
    scores: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    dataset: PreferenceDataset,
    state: State,
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of a scored dataset, named `eval_...`.  The loss sees it as one batch.

    Args:
      evaluate: from `make_evaluation`.
      scores: the trained model's scores, float32 [N, K] by name; by model and name if
        two models are trained.
      reference: the reference's scores, float32 [N, K] by name.
      dataset: N pairs.
      state: the objective's state.
      sources: names of its sources; of several, each gets the metrics in `BY_SOURCE`
        too, named `eval_.../NAME`, as if it were the whole dataset.
    """
    batch = one_batch(dataset, reference)
    scores = jax.tree.map(lambda table: table[:, None], scores)
    found = jax.device_get(evaluate(scores, batch, state))
    own = dataset.columns["source"][:, None]
    for n, name in enumerate(sources if len(sources) > 1 else ()):
        if (own == n).any():
            part = jax.device_get(evaluate(scores, only(batch, own == n), state))
            found |= {f"{k}/{name}": x for k, x in part.items() if k in BY_SOURCE}
    return {f"eval_{name}": float(value) for name, value in found.items()}
