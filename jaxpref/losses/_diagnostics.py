"""Diagnostics of pairs: ranking and likelihood displacement.

None of these is a training objective.  Each function returns one number per pair, which
the caller averages.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, PerPair, Scalar

__all__ = [
    "ches",
    "idealized_ranking_accuracy",
    "length_normalized_ches",
    "ranking_accuracy",
    "ranking_difficulty",
]

Hidden = Float[Array, "*batch width"]
"""One hidden state per answer."""


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
    margin = (chosen - rejected) + log_odds / _common.scalar("beta", beta, chosen)
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
    beta = _common.scalar("beta", beta, chosen)
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
