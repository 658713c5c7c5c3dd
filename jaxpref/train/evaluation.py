"""Metrics of held-out pairs during training."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxpref.data import PreferenceDataset
from jaxpref.data.batch import PreferenceBatch
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import Objective, State
from jaxpref.scoring.scores import Scores


def make_evaluation(objective: Objective) -> Callable:
    """The jitted `(scores, batch, state) -> metrics` of held-out pairs."""

    def evaluate(
        scores: Scores, batch: PreferenceBatch, state: State
    ) -> dict[str, jax.Array]:
        inputs = Inputs(scores, batch)
        losses, learned = objective.evaluation(inputs, state)
        metrics = {"loss": losses.sum() / objective.count(batch)}
        return metrics | objective.metrics(inputs) | learned

    return jax.jit(evaluate)


def evaluation_metrics(
    evaluate: Callable,
    scores: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    dataset: PreferenceDataset,
    state: State,
) -> dict[str, float]:
    """Metrics of a scored dataset, named `eval_...`.  The loss sees it as one batch.

    Args:
      evaluate: from `make_evaluation`.
      scores: the trained model's scores, float32 [N, K] by name; by model and name if
        two models are trained.
      reference: the reference's scores, float32 [N, K] by name.
      dataset: N pairs.
      state: the objective's state.
    """
    count = len(dataset)
    no_tokens = np.zeros((count, 1, 0), np.int32)
    batch = PreferenceBatch(
        tokens=no_tokens,
        lengths=no_tokens[..., 0:0],
        predictors=no_tokens,
        targets=no_tokens,
        completions=no_tokens,
        pair_index=np.arange(count, dtype=np.int32)[:, None],
        completion_lengths=dataset.completion_lengths[:, None],
        reference={name: table[:, None] for name, table in reference.items()},
        is_flipped=dataset.columns["is_flipped"][:, None],
        annotator=dataset.columns["annotator"][:, None],
        empty_trace=dataset.columns["empty_trace"][:, None],
        weights=np.ones((count, 1), np.float32),
        labels={name: values[:, None] for name, values in dataset.labels.items()},
    )
    scores = jax.tree.map(lambda table: table[:, None], scores)
    metrics = jax.device_get(evaluate(scores, batch, state))
    return {f"eval_{name}": float(value) for name, value in metrics.items()}
