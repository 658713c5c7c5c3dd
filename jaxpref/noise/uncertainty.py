"""Model uncertainty about labels from repeated scores of the same pairs.

The repetitions, on the first axis, are passes with dropout enabled (UPO) or the members
of an ensemble.  Probabilities are relative to the label: s(r_w - r_l), the probability
that the chosen answer is the better one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

from jaxpref.losses import _common
from jaxpref.losses._common import Mask, PerPair, Scalar
from jaxpref.sharding import replicated

__all__ = ["bald", "disagreement", "drop_and_sample", "mean_probability"]

Repeated = Float[Array, "passes *batch"]
"""One number per pass (or member of an ensemble) and pair."""
RandomKey = Key[Array, ""] | UInt32[Array, "2"]


def mean_probability(probabilities: Repeated) -> PerPair:
    """The mean prediction of all passes.

        out = mean over t of p_t

    Below 1/2, the passes contradict the label.

    Args:
      probabilities: p_t, in [0, 1]; [T, *batch], T >= 1.

    Returns:
      One probability per pair, [*batch], at least float32.

    Raises:
      TypeError: if the array is not floating point.
      ValueError: if it holds no pass.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.uncertainty import mean_probability
      >>> print(mean_probability(jnp.array([[0.25, 1.0], [0.75, 1.0]])))
      [0.5 1. ]

    References:
      Wang et al., "Self-Evolutionary Large Language Models through Uncertainty-Enhanced
      Preference Optimization" (UPO), 2024, arXiv:2409.11212.
    """
    return jnp.mean(_passes(probabilities=probabilities), axis=0)


def bald(probabilities: Repeated) -> PerPair:
    """The BALD score: the mutual information of the label and the weights.

        out = H(mean_t p_t) - mean_t H(p_t),  H(p) = -p log p - (1 - p) log(1 - p)

    It measures the disagreement of the passes.  It is 0 if all predict the same
    probability, even 1/2, and log 2 if half are certain of each answer.

    Args:
      probabilities: p_t, in [0, 1]; [T, *batch], T >= 1.

    Returns:
      One number per pair in nats, [*batch], at least float32; in [0, log 2].

    Raises:
      TypeError: if the array is not floating point.
      ValueError: if it holds no pass.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.uncertainty import bald
      >>> passes = jnp.array([[0.5, 0.0], [0.5, 1.0]])
      >>> [f"{x:.4f}" for x in bald(passes)]  # undecided; divided
      ['0.0000', '0.6931']

    References:
      Houlsby et al., "Bayesian Active Learning for Classification and Preference
      Learning", 2011, arXiv:1112.5745.
      wjn1996/Uncertainty-Preference-Optimization, src/alignment/inference/estimating.
    """
    passes = _passes(probabilities=probabilities)
    total = _entropy(jnp.mean(passes, axis=0))
    # Rounding may take the difference of two equal entropies below 0.
    return jnp.maximum(total - jnp.mean(_entropy(passes), axis=0), 0)


def disagreement(scores: Repeated) -> PerPair:
    """The variance of a pair's score over the members of an ensemble.

        out = mean_t (s_t - mean_t s_t)^2

    Use margins r_w - r_l, not rewards: the rewards of each member are determined only
    up to a constant per prompt, which would add to the variance.

    Args:
      scores: s_t, for example reward margins in nats; [T, *batch], T >= 1.

    Returns:
      One variance per pair, the score's unit squared, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if the array is not floating point.
      ValueError: if it holds no score.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.uncertainty import disagreement
      >>> print(disagreement(jnp.array([[1.0, 2.0], [3.0, 2.0]])))
      [1. 0.]

    References:
      Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation
      using Deep Ensembles", 2016, arXiv:1612.01474.
    """
    return jnp.var(_passes(scores=scores), axis=0)


def drop_and_sample(
    mean_probabilities: PerPair,
    weights: PerPair,
    key: RandomKey,
    *,
    share: Scalar = 0.5,
    where: Mask = None,
) -> Bool[Array, "*batch"]:
    """UPO's filter: drops pairs that the model contradicts and samples from the rest.

        agrees_i = mean_t p_t,i >= 1/2
        P(i drawn next)  proportional to  weight_i, among those that agree

    without replacement, until floor(share n) of the n pairs that agree are drawn.
    UPO's weights are `1 - bald(p)` (easy pairs first) or `bald(p)` (hard pairs first).
    Uses the Gumbel top-k trick, which has the same distribution; pairs of weight 0 are
    drawn last.  The noise depends on the position of the pair in the global batch,
    regardless of its sharding.

    Args:
      mean_probabilities: probabilities that the label is right, from
        `mean_probability`; [*batch].
      weights: >= 0, of any scale; [*batch].
      key: a jax random key.
      share: fraction of the agreeing pairs to draw, in [0, 1].
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      Which pairs were drawn, [*batch]; false where not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `share` is outside [0, 1].

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpref.noise.uncertainty import bald, drop_and_sample, mean_probability
      >>> p = jnp.array([[0.9, 0.2, 0.9, 0.6], [0.9, 0.4, 0.1, 0.8]])
      >>> key = jax.random.key(0)
      >>> print(drop_and_sample(mean_probability(p), 1 - bald(p), key, share=0.7))
      [ True False False  True]

    References:
      Wang et al., "Self-Evolutionary Large Language Models through Uncertainty-Enhanced
      Preference Optimization" (UPO), 2024, arXiv:2409.11212.
      wjn1996/Uncertainty-Preference-Optimization, src/alignment/inference/estimating;
      there `share` is `bald_rate` and 0.5.
    """
    _common.fraction("share", share)
    probabilities, weights = _common.promoted(
        mean_probabilities=mean_probabilities, weights=weights
    )
    agrees = _common.mask(where, weights) & (probabilities >= 0.5)
    # Relative to the largest, so that the scale does not matter; all 0 means uniform.
    largest = jnp.max(weights, initial=0, where=agrees)
    weights = jnp.where(largest > 0, weights / largest, 1)
    log_weights = jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
    scores = replicated(jnp.where(agrees, log_weights, -jnp.inf)).reshape(-1)
    noise = jax.random.gumbel(key, scores.shape, scores.dtype)
    place = jnp.argsort(jnp.argsort(-(scores + noise))).reshape(weights.shape)
    # Plus 0.001, so that 10 * 0.7 in floating point does not round down to 6.
    count = jnp.floor(jnp.sum(agrees) * jnp.asarray(share, weights.dtype) + 1e-3)
    return agrees & (place < count)


def _entropy(p: jax.Array) -> jax.Array:
    return jax.scipy.special.entr(p) + jax.scipy.special.entr(1 - p)


def _passes(**array) -> jax.Array:
    """The array, promoted; raises ValueError if it holds no pass."""
    ((name, _),) = array.items()
    (values,) = _common.promoted(**array)
    if values.ndim < 1 or not len(values):
        raise ValueError(
            f"Expected {name} of shape [T, ...] with T >= 1, got {values.shape}."
        )
    return values
