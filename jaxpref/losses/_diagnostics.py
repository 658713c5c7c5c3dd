"""Diagnostics: ranking, likelihood displacement, calibration, and divergence.

None of these is a training objective.  Each function returns one number per pair or
sample, which the caller averages, except the calibration error, which is one number for
all pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Mask, PerPair, Scalar

__all__ = [
    "brier_score",
    "ches",
    "expected_calibration_error",
    "idealized_ranking_accuracy",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "length_normalized_ches",
    "ranking_accuracy",
    "ranking_difficulty",
]

Hidden = Float[Array, "*batch width"]
"""One hidden state per answer."""
Outcomes = Num[Array, "*batch"]
"""Observed outcomes: 1, 0, or 1/2 for a tie."""


def ranking_accuracy(chosen_logps: PerPair, rejected_logps: PerPair) -> PerPair:
    """Whether the chosen answer is at least as likely as the rejected one.

        accuracy = 1 if log pi(y_w|x) >= log pi(y_l|x) else 0

    This compares log-probs, not rewards: a policy may be far above its reference on
    every chosen answer and still prefer the rejected one.  Ties count 1, as in the
    paper; `reward_accuracies(chosen_logps, rejected_logps)` counts them 1/2.

    Args:
      chosen_logps: log pi(y_w|x) summed (or averaged) over completion tokens; [*batch].
      rejected_logps: log pi(y_l|x), the same way; [*batch].

    Returns:
      One of 0 and 1 per pair, [*batch], at least float32; NaN where a log-prob is NaN.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ranking_accuracy
      >>> print(ranking_accuracy(jnp.array([-3.0, -5.0]), jnp.array([-3.0, -4.0])))
      [1. 0.]

    References:
      Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings",
      2024, arXiv:2405.19534, the ranking accuracy.
    """
    chosen, rejected = _common.promoted(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps
    )
    return _indicator(chosen + rejected, chosen >= rejected)


def idealized_ranking_accuracy(
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    preference_probabilities: PerPair,
    *,
    beta: Scalar = 0.1,
    eps: Scalar = 1e-3,
) -> PerPair:
    """The ranking accuracy of the policy that minimizes DPO perfectly.

        accuracy = 1 if log(ref(y_w|x) / ref(y_l|x)) + logit(a) / beta > 0 else 0

    The left side is log pi*(y_w|x) / pi*(y_l|x) of the optimal policy.  Needs no
    training: if a pair has 0, DPO with this reference and beta cannot learn its order.

    Args:
      reference_chosen_logps: log ref(y_w|x) summed over completion tokens; [*batch].
      reference_rejected_logps: log ref(y_l|x), the same way; [*batch].
      preference_probabilities: a, the share of annotators who prefer y_w; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      eps: shares are clipped to [eps, 1 - eps], because the logit is infinite at 0 and
        1; in (0, 1/2).

    Returns:
      One of 0 and 1 per pair, [*batch], at least float32; NaN where an input is NaN.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta` is not > 0 or `eps` outside
        (0, 1/2).

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import idealized_ranking_accuracy
      >>> chosen, rejected = jnp.array([-30.0, -90.0]), jnp.array([-20.0, -20.0])
      >>> print(idealized_ranking_accuracy(chosen, rejected, jnp.array([0.8, 0.8])))
      [1. 0.]

    References:
      Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings",
      2024, arXiv:2405.19534, Theorem 3.1.
      angie-chen55/pref-learning-ranking-acc, rlhf_minimizer_client.py, for `eps`.
    """
    _common.positive("beta", beta)
    _common.between("eps", eps, 0.0, 0.5)
    chosen, rejected, shares = _common.promoted(
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        preference_probabilities=preference_probabilities,
    )
    shares = jnp.clip(shares, eps, 1 - eps)
    log_odds = jnp.log(shares) - jnp.log1p(-shares)
    margin = (chosen - rejected) + log_odds / jnp.asarray(beta, chosen.dtype)
    return _indicator(margin, margin > 0)


def ranking_difficulty(
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.1,
) -> PerPair:
    """How small the DPO loss must be for the policy to rank a pair as labeled.

        threshold = -log s(beta c),    c = log ref(y_l|x) / ref(y_w|x)

    `ranking_accuracy` is 1 exactly if `dpo` is at most this threshold.  It is log 2 if
    the reference has no preference.  A smaller threshold is harder to reach: if the
    reference prefers the rejected answer by c nats, the loss has to fall to about
    exp(-beta c).

    Args:
      reference_chosen_logps: log ref(y_w|x) summed over completion tokens; [*batch].
      reference_rejected_logps: log ref(y_l|x), the same way; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One threshold per pair, a DPO loss, [*batch], at least float32; > 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ranking_difficulty
      >>> chosen, rejected = jnp.array([-20.0, -60.0]), jnp.array([-20.0, -20.0])
      >>> [f"{x:.4f}" for x in ranking_difficulty(chosen, rejected)]
      ['0.6931', '0.0181']

    References:
      Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings",
      2024, arXiv:2405.19534, Theorem 4.1.
    """
    _common.positive("beta", beta)
    chosen, rejected = _common.promoted(
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    beta = jnp.asarray(beta, chosen.dtype)
    return _common.logistic_loss(beta * (rejected - chosen))


def ches(chosen_hidden_sums: Hidden, rejected_hidden_sums: Hidden) -> PerPair:
    """The centered hidden embedding similarity of a pair.

        score = <S_w, S_l> - ||S_w||^2

    The higher the score, the more training on the pair tends to lower the likelihood of
    both answers (likelihood displacement).  Such pairs are filtered out beforehand.

    Args:
      chosen_hidden_sums: S_w, the sum of the last layer's hidden states at the |y_w|
        positions that predict a token of y_w, from the prompt's last token to the
        answer's second-to-last; [*batch, width].
      rejected_hidden_sums: S_l, the same for y_l; [*batch, width].

    Returns:
      One score per pair, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ches
      >>> print(ches(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])))
      2.0

    References:
      Razin et al., "Unintentional Unalignment: Likelihood Displacement in Direct
      Preference Optimization", 2024, arXiv:2410.08847, the CHES score.
      princeton-nlp/unintentional-unalignment, ches/ches.py.
    """
    chosen, rejected = _common.promoted(
        chosen_hidden_sums=chosen_hidden_sums,
        rejected_hidden_sums=rejected_hidden_sums,
    )
    # Factored, because the two terms are large and nearly equal.
    return jnp.sum(chosen * (rejected - chosen), axis=-1)


def length_normalized_ches(
    chosen_hidden_sums: Hidden,
    rejected_hidden_sums: Hidden,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
) -> PerPair:
    """`ches` of the means of the hidden states instead of their sums.

        score = <S_w, S_l> / (|y_w| |y_l|) - ||S_w||^2 / |y_w|^2

    Use it to compare pairs of different lengths, because sums grow with the length.

    Args:
      chosen_hidden_sums: S_w as for `ches`; [*batch, width].
      rejected_hidden_sums: S_l, the same for y_l; [*batch, width].
      chosen_lengths: |y_w|, hidden states in the sum; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, hidden states in the sum; 0 counts as 1; [*batch].

    Returns:
      One score per pair, [*batch], at least float32.

    Raises:
      TypeError: if a hidden state is not floating point.
      ValueError: if shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import length_normalized_ches
      >>> sums = jnp.array([[1.0, 2.0]]), jnp.array([[6.0, 4.0]])
      >>> print(length_normalized_ches(*sums, jnp.array([1]), jnp.array([2])))
      [2.]

    References:
      Razin et al., "Unintentional Unalignment: Likelihood Displacement in Direct
      Preference Optimization", 2024, arXiv:2410.08847, the length-normalized CHES
      score.
      princeton-nlp/unintentional-unalignment, ches/ches.py, `length_normalize`.
    """
    chosen, rejected = _common.promoted(
        chosen_hidden_sums=chosen_hidden_sums,
        rejected_hidden_sums=rejected_hidden_sums,
    )
    return ches(
        _averaged(chosen, chosen_lengths, "chosen_lengths"),
        _averaged(rejected, rejected_lengths, "rejected_lengths"),
    )


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


def kl_k1(log_ratios: PerPair) -> PerPair:
    """The simple estimator of KL(pi||ref) from a sample of pi.

        k1 = l,    l = log pi(y|x) / ref(y|x),  y ~ pi

    Unbiased, but has high variance and is often negative, although the KL is not.

    Args:
      log_ratios: l, log pi minus log ref of what pi sampled, nats; [*batch].

    Returns:
      One estimate per sample in nats, [*batch], at least float32.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_k1
      >>> print(kl_k1(jnp.array([0.5, -0.5])))
      [ 0.5 -0.5]

    References:
      Schulman, "Approximating KL Divergence", 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    (log_ratios,) = _common.promoted(log_ratios=log_ratios)
    return log_ratios


def kl_k2(log_ratios: PerPair) -> PerPair:
    """The squared estimator of KL(pi||ref) from a sample of pi.

        k2 = l^2 / 2,    l = log pi(y|x) / ref(y|x),  y ~ pi

    Has low variance and is >= 0, but is biased (little, if the two are close).

    Args:
      log_ratios: l, log pi minus log ref of what pi sampled, nats; [*batch].

    Returns:
      One estimate per sample in nats, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_k2
      >>> print(kl_k2(jnp.array([0.5, -0.5])))
      [0.125 0.125]

    References:
      Schulman, "Approximating KL Divergence", 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    (log_ratios,) = _common.promoted(log_ratios=log_ratios)
    return 0.5 * jnp.square(log_ratios)


def kl_k3(log_ratios: PerPair) -> PerPair:
    """The unbiased, nonnegative estimator of KL(pi||ref) from a sample of pi.

        k3 = exp(-l) - 1 + l,    l = log pi(y|x) / ref(y|x),  y ~ pi

    k1 with a control variate: exp(-l) - 1 = ref/pi - 1 has mean 0 under pi.  The
    exponent -l is clipped at 80 to prevent overflow in float32.

    Args:
      log_ratios: l, log pi minus log ref of what pi sampled, nats; [*batch].

    Returns:
      One estimate per sample in nats, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_k3
      >>> [f"{x:.4f}" for x in kl_k3(jnp.array([0.5, -0.5]))]
      ['0.1065', '0.1487']

    References:
      Schulman, "Approximating KL Divergence", 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    (log_ratios,) = _common.promoted(log_ratios=log_ratios)
    return jnp.expm1(jnp.minimum(-log_ratios, 80)) + log_ratios


def _indicator(like: jax.Array, holds: jax.Array) -> jax.Array:
    """1 where it holds, else 0; NaN where `like` is NaN."""
    return jnp.where(jnp.isnan(like), like, holds.astype(like.dtype))


def _averaged(sums: jax.Array, lengths, name: str) -> jax.Array:
    """Sums of hidden states divided by lengths; a length of 0 counts as 1."""
    lengths = jnp.asarray(lengths, sums.dtype)
    if lengths.shape != sums.shape[:-1]:
        raise ValueError(
            f"Expected {name} of shape {sums.shape[:-1]}, got {lengths.shape}."
        )
    return sums / jnp.maximum(lengths, 1)[..., None]


def _outcomes(probabilities: jax.Array, outcomes) -> jax.Array:
    """`outcomes` in the dtype of `probabilities`, of the same shape."""
    _common.same_shape(probabilities=probabilities, outcomes=outcomes)
    return jnp.asarray(outcomes, probabilities.dtype)
