"""Combining rewards, which may have different scales."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


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
