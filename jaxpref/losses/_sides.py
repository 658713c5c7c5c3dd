"""Pairwise losses with a separate term for the chosen and the rejected answer.

A loss that depends only on the margin decreases even if both answers become less
likely, as long as the rejected one does so faster.  The losses here constrain each
side, in terms of

    a_w   log pi(y_w|x)/ref(y_w|x), the log-ratio of the chosen answer
    a_l   log pi(y_l|x)/ref(y_l|x), the log-ratio of the rejected answer
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = ["apo_down", "apo_zero", "bco_pair", "nca_pair", "sppo_hard"]


def nca_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.01,
) -> PerPair:
    """Noise contrastive alignment of a pair: classifies answers as policy or noise.

        loss = -log s(beta a_w) - 1/2 log s(-beta a_w) - 1/2 log s(-beta a_l)

    The optimum of the chosen reward beta a_w is the finite value log 2; the rejected
    reward is pushed down.  Convex in both.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, the paper's alpha, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; > 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import nca_pair
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(nca_pair(logps, logps, logps, logps))
      [1.3862944 1.3862944]

    References:
      Chen et al., "Noise Contrastive Alignment of Language Models with Explicit
      Rewards", 2024, arXiv:2402.05369, the NCA objective of a preference pair.
      TRL, trl/trainer/dpo_trainer.py, "nca_pair".
    """
    chosen, rejected = _common.answer_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    noise = _common.logistic_loss(-chosen) + _common.logistic_loss(-rejected)
    return _common.logistic_loss(chosen) + 0.5 * noise


def apo_zero(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Anchored preference optimization: raises the chosen, lowers the rejected answer.

        loss = 1 - s(beta a_w) + s(beta a_l)

    For chosen answers that are better than the policy's own.  Bounded in (0, 2): the
    gradient of an answer vanishes if its log-ratio is far from 0 in either direction,
    as in pairs that the policy strongly contradicts.  Not convex.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; in [0, 2].

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import apo_zero
      >>> zero, margin = jnp.zeros(3), jnp.array([0.0, 1000.0, -1000.0])
      >>> print(apo_zero(margin, -margin, zero, zero))
      [1. 0. 2.]

    References:
      D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions:
      Addressing Underspecification in Alignment", 2024, arXiv:2408.06266, Eq. 7.
      TRL, trl/trainer/dpo_trainer.py, "apo_zero".
    """
    chosen, rejected = _common.answer_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Anchored preference optimization: lowers both answers, the rejected one more.

        loss = s(beta a_w) + 1 - s(beta (a_w - a_l))

    For chosen answers that are worse than the policy's own.  Bounded in (0, 2), so the
    gradient of the margin vanishes for a strongly contradicted pair.  Not convex.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; in [0, 2].

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import apo_down
      >>> zero, down = jnp.zeros(2), jnp.array([0.0, -1000.0])
      >>> print(apo_down(down, 2 * down, zero, zero))
      [1. 0.]

    References:
      D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions:
      Addressing Underspecification in Alignment", 2024, arXiv:2408.06266, Eq. 8.
      TRL, trl/trainer/dpo_trainer.py, "apo_down".
    """
    chosen, rejected = _common.answer_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def sppo_hard(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 1e-3,
) -> PerPair:
    """Self-play preference optimization with hard labels: one target per answer.

        loss = (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2

    The paper regresses each log-ratio onto eta (P(y beats pi) - 1/2).  Here the chosen
    answer wins with probability 1, the rejected with 0, and `beta` is 1 / eta.  Convex.
    The gradient is proportional to the distance from the target, without bound.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: 1 / eta, > 0; the targets are +-1 / (2 beta) nats.

    Returns:
      One loss per pair in nats squared, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sppo_hard
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(sppo_hard(logps, logps, logps, logps, beta=0.5))
      [2. 2.]

    References:
      Wu et al., "Self-Play Preference Optimization for Language Model Alignment", 2024,
      arXiv:2405.00675, Eq. 4.7 with win probabilities 1 and 0.
      TRL, trl/trainer/dpo_trainer.py, "sppo_hard".
    """
    _common.positive("beta", beta)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    target = 0.5 / _common.per_pair("beta", beta, chosen)
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def bco_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.01,
) -> PerPair:
    """Binary classifier optimization of a pair: chosen is class 1, rejected class 0.

        loss = -log s(beta a_w) - log s(-beta a_l)

    The paper's loss with a reward shift of 0.  Convex, and an upper bound on `dpo` with
    the same `beta`.  The gradient of each answer is the classifier's error, so
    misclassified answers have the largest gradients, including flipped labels.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import bco_pair
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(bco_pair(logps, logps, logps, logps))
      [1.3862944 1.3862944]

    References:
      Jung et al., "Binary Classifier Optimization for Large Language Model Alignment",
      2024, arXiv:2404.04656, the binary cross-entropy with shift 0.
      TRL, trl/trainer/dpo_trainer.py, "bco_pair".
    """
    chosen, rejected = _common.answer_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return _common.logistic_loss(chosen) + _common.logistic_loss(-rejected)
