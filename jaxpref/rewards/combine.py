"""Combining rewards, which may have different scales."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LEAST_ANSWERS = 3
"""To a prompt, for `lower_bound` to compare them."""


def log_sigmoid_centered(
    rewards: Float[np.ndarray, " K"], reference: float | Float[np.ndarray, ""]
) -> Float[np.ndarray, " K"]:
    """A reward after which more of what is good already counts little.

        u(x, y) = log sigmoid(r(x, y) - r_ref(x))

    If r is from a Bradley-Terry model, u is the log-probability that y is better than
    an answer with the reward r_ref.  The sum of several such rewards is then the
    log-probability that y is better in every respect, if these are independent.  Wang
    et al. 2024, arXiv:2402.00742.

    Args:
      rewards: r(x, y) of the answers to a prompt.
      reference: r_ref(x), such as the 0.85 quantile of the rewards of the answers that
        the model gives before it is trained.

    Returns:
      u, below 0.
    """
    return -np.logaddexp(0.0, reference - np.asarray(rewards, float))


def weighted_sum(
    rewards: Sequence[Float[np.ndarray, " K"]], weights: Sequence[float]
) -> Float[np.ndarray, " K"]:
    """The sum of weight times reward."""
    return np.sum([w * r for w, r in zip(weights, rewards, strict=True)], axis=0)


def lower_bound(
    rewards: Sequence[Float[np.ndarray, " K"]], weight: float
) -> Float[np.ndarray, " K"]:
    """The mean of an ensemble of rewards, less its disagreement.

        mean over m of r_m(y_k) - weight * std over m of [r_m(y_k) - mean over k of r_m]

    A policy that maximizes one reward finds answers that the reward overrates; those
    that the members of an ensemble judge differently are penalized.  Coste et al. 2023,
    arXiv:2310.02743, subtract a multiple of the variance.  A reward model is determined
    up to a constant for each prompt, so the deviation is relative to the mean over the
    answers to the prompt.  It is 0 for one answer, and the same for both of two, so it
    takes `LEAST_ANSWERS` to compare them.

    Args:
      rewards: of each member, those of the K answers to a prompt; NaN for none.
      weight: of the standard deviation, >= 0.

    Returns:
      One reward per answer; NaN where a member has none.
    """
    table = np.stack(rewards)
    known = np.isfinite(table).all(0)
    found = np.full(table.shape[1], np.nan)
    values = table[:, known]
    if values.size:
        relative = values - values.mean(1, keepdims=True)
        found[known] = values.mean(0) - weight * relative.std(0)
    return found
