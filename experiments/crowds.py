"""Crowd-BT on pairs of arguments, without and with the text."""

import numpy as np

from jaxpref.noise import crowd


def fit_strengths(
    at,
    item: np.ndarray,
    worker: np.ndarray,
    sign: np.ndarray,
    *,
    scores: np.ndarray,
    num_workers: int,
    spread: float,
    prior,
    shared: np.ndarray | None = None,
) -> crowd.Fit:
    """Crowd-BT with the prior mean `scores` [T, S] of the arguments.

    Args:
      at: (topic, first, second) of each pair, int [P].
      item: index of each vote's pair, int [V].
      worker: int [V].
      sign: int [V]; 1 for the first argument, -1 for the second.
      scores: scores from the text, nats; zeros without the text.
      num_workers: K.
      spread: standard deviation of the strengths around the scores, nats.
      prior: right and wrong pseudo-votes of every worker.
      shared: pair of each vote, int [V], if the votes on a pair share a latent truth;
        None if they are independent, as in Chen et al.
    """
    topic, *places = at
    first, second = (
        (topic * scores.shape[1] + place)[item].astype(np.int32) for place in places
    )
    return crowd.fit(
        np.where(sign > 0, first, second),
        np.where(sign > 0, second, first),
        worker,
        num_items=scores.size,
        num_annotators=num_workers,
        prior_mean=scores.ravel().astype(np.float32),
        spread=spread,
        pairs=shared,
        prior=prior,
        tolerance=1e-3,
    )


def differences(values: np.ndarray, at) -> np.ndarray:
    """Value of the first minus that of the second argument of each pair; [P]."""
    topic, first, second = at
    return values[topic, first] - values[topic, second]


def share_right(found: crowd.Fit, worker: np.ndarray, prior) -> np.ndarray:
    """The expected share of a worker's votes for the stronger argument, [K].

    It depends on how hard the worker's pairs were, as agreement with gold does.  It is
    shrunk by the pseudo-votes of the prior.
    """
    a, b = prior
    counts = np.asarray(found.counts, np.float64)
    right = np.bincount(worker, np.asarray(found.stronger), len(counts))
    return (a + right) / (a + b + counts)
