"""Diagnostics of predicted probabilities: accuracy and calibration."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxpref.losses import _common
from jaxpref.losses._common import Mask, PerPair

__all__ = ["brier_score", "expected_calibration_error"]

Outcomes = Num[Array, "*batch"]
"""Observed outcomes: 1, 0, or 1/2 for a tie."""


def brier_score(probabilities: PerPair, outcomes: Outcomes) -> PerPair:
    """Squared error of a predicted probability.

        score = (p - outcome)^2

    Its mean is 0 for an oracle and 1/4 for a constant prediction of 1/2.

    Args:
      probabilities: p, that the first answer is preferred, in [0, 1]; [*batch].
      outcomes: 1 if it was, 0 if not, 1/2 for a tie; [*batch].

    Returns:
      One score per pair, [*batch], at least float32; in [0, 1].

    Raises:
      TypeError: if `probabilities` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import brier_score
      >>> print(brier_score(jnp.array([0.5, 1.0, 1.0]), jnp.array([1, 1, 0])))
      [0.25 0.   1.  ]

    References:
      Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.
    """
    (probabilities,) = _common.promoted(probabilities=probabilities)
    return jnp.square(probabilities - _outcomes(probabilities, outcomes))


def expected_calibration_error(
    probabilities: PerPair,
    outcomes: Outcomes,
    *,
    bins: int = 10,
    where: Mask = None,
) -> Float[Array, ""]:
    """Mean distance between the confidence and the accuracy of predictions.

        sum over bins of  pairs in bin / pairs * |accuracy - confidence|

    The prediction is the more likely answer, and its confidence is max(p, 1 - p) in
    [1/2, 1].  At p = 1/2 it counts as half right.  The bins have equal widths.

    Args:
      probabilities: p, that the first answer is preferred, in [0, 1]; [*batch].
      outcomes: 1 if it was, 0 if not, 1/2 for a tie; [*batch].
      bins: equal-width bins of [1/2, 1]; the upper edge belongs to the next bin.
      where: which pairs are real; the others are ignored; [*batch].

    Returns:
      One number in [0, 1] for all pairs, [], at least float32; 0 if there is no pair,
      NaN if a real pair's input is.

    Raises:
      TypeError: if `probabilities` is not floating point.
      ValueError: if shapes differ or `bins` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import expected_calibration_error
      >>> sure = jnp.array([0.75, 0.75, 0.25, 0.25])
      >>> print(expected_calibration_error(sure, jnp.array([1, 1, 0, 1])))
      0.0
      >>> print(expected_calibration_error(sure, jnp.array([1, 1, 0, 0])))
      0.25

    References:
      Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599,
      Eq. 3.
    """
    if bins < 1:
        raise ValueError(f"Expected bins >= 1, got {bins}.")
    (probabilities,) = _common.promoted(probabilities=probabilities)
    outcomes = _outcomes(probabilities, outcomes)
    where = _common.mask(where, probabilities)
    # Masked before any arithmetic, because padding may hold anything.
    probabilities = jnp.where(where, probabilities, 0.5)
    outcomes = jnp.where(where, outcomes, 0.5)
    confidence = jnp.maximum(probabilities, 1 - probabilities)
    hits = 0.5 + jnp.sign(probabilities - 0.5) * (outcomes - 0.5)
    gaps = jnp.where(where, hits - confidence, 0)
    # NaN belongs to no bin; the clip assigns one, so that the result is NaN.
    index = jnp.clip(((confidence - 0.5) * 2 * bins).astype(jnp.int32), 0, bins - 1)
    numbered = jnp.arange(bins).reshape((1,) * index.ndim + (bins,))
    own = index[..., None] == numbered
    sums = jnp.sum(jnp.where(own, gaps[..., None], 0), axis=tuple(range(index.ndim)))
    return jnp.sum(jnp.abs(sums)) / jnp.maximum(jnp.sum(where), 1).astype(sums.dtype)


def _outcomes(probabilities: jax.Array, outcomes) -> jax.Array:
    """`outcomes` in the dtype of `probabilities`, of the same shape."""
    _common.same_shape(probabilities=probabilities, outcomes=outcomes)
    return jnp.asarray(outcomes, probabilities.dtype)
