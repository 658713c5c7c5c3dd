"""How sure a model is of a label: repeated scores of the same pairs, compared.

The repetitions are passes with dropout left on (UPO) or the members of an ensemble; the
first axis counts them.  Probabilities are oriented by the label: of a pair, that its
chosen answer is the better one, s(r_w - r_l).
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
    """What the passes predict together.

        out = mean over t of p_t

    Below 1/2 they contradict the label.

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
    """By how much the passes disagree: what the answer would tell of the weights.

        out = H(mean_t p_t) - mean_t H(p_t),  H(p) = -p log p - (1 - p) log(1 - p)

    The mutual information of label and weights.  0 where all passes predict the same,
    however undecided they are; log 2 where each is certain and half of them of either
    answer.

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
      >>> [f"{x:.4f}" for x in bald(passes)]  # undecided, and divided
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

    Of margins r_w - r_l, not of rewards: each member's rewards are known up to a
    constant of the prompt alone, which a variance of rewards would count.

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
    """UPO's filter: drops what the model contradicts, and samples from the rest.

        agrees_i = mean_t p_t,i >= 1/2
        P(i drawn next)  proportional to  weight_i, among those that agree

    without replacement, until floor(share n) of the n pairs that agree are drawn.
    UPO's weights are `1 - bald(p)` (easy pairs first) or `bald(p)` (hard pairs first).
    Drawn as the largest of log-weights plus Gumbel noise, which is the same
    distribution; a weight of 0 is drawn after all others.  The noise belongs to the
    pair's place in the global batch, however it lies on devices.

    Args:
      mean_probabilities: that the label is right, as of `mean_probability`; [*batch].
      weights: >= 0, of any scale; [*batch].
      key: a jax random key.
      share: the part of the pairs that agree which is drawn, in [0, 1].
      where: which pairs are real, [*batch]; None if all are.  What the others hold
        (NaN included) does not matter.

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
    # Against the largest, so that a weight's size does not matter; all 0 are all alike.
    largest = jnp.max(weights, initial=0, where=agrees)
    weights = jnp.where(largest > 0, weights / largest, 1)
    log_weights = jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
    scores = replicated(jnp.where(agrees, log_weights, -jnp.inf)).reshape(-1)
    noise = jax.random.gumbel(key, scores.shape, scores.dtype)
    place = jnp.argsort(jnp.argsort(-(scores + noise))).reshape(weights.shape)
    # A thousandth, so that 10 * 0.7 in floats does not round down to 6.
    count = jnp.floor(jnp.sum(agrees) * jnp.asarray(share, weights.dtype) + 1e-3)
    return agrees & (place < count)


def _entropy(p: jax.Array) -> jax.Array:
    return jax.scipy.special.entr(p) + jax.scipy.special.entr(1 - p)


def _passes(**array) -> jax.Array:
    """The array, promoted; raises ValueError unless it holds a pass."""
    ((name, _),) = array.items()
    (values,) = _common.promoted(**array)
    if values.ndim < 1 or not len(values):
        raise ValueError(
            f"Expected {name} of shape [T, ...] with T >= 1, got {values.shape}."
        )
    return values
