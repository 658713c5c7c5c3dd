"""Pairwise losses that treat the chosen and the rejected answer separately.

A loss that depends only on the margin decreases even if both answers become less
likely, as long as the rejected one does so faster.  The losses here constrain each
side, in terms of

    a_w   log pi(y_w|x)/ref(y_w|x), the log-ratio of the chosen answer
    a_l   log pi(y_l|x)/ref(y_l|x), the log-ratio of the rejected answer
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import PerPair, Scalar

__all__ = [
    "apo_down",
    "apo_zero",
    "bco_pair",
    "dpop",
    "flex_dpo",
    "nca_pair",
    "sppo_hard",
]


def nca_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.01,
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
    chosen, rejected = _rewards(
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
    beta: Scalar = 0.1,
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
    chosen, rejected = _rewards(
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
    beta: Scalar = 0.1,
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
    chosen, rejected = _rewards(
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
    beta: Scalar = 1e-3,
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
    target = 0.5 / jnp.asarray(beta, chosen.dtype)
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def bco_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.01,
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
    chosen, rejected = _rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return _common.logistic_loss(chosen) + _common.logistic_loss(-rejected)


def dpop(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.3,
    penalty: Scalar = 50.0,
) -> PerPair:
    """DPO-Positive (Smaug): DPO that keeps the chosen answer from becoming less likely.

        loss = -log s(beta (a_w - a_l - penalty max(0, -a_w)))

    If the chosen answer is at least as likely as under the reference, value and
    gradient are those of `dpo`.  Otherwise, every nat below the reference costs
    `penalty` nats of margin, so raising the chosen answer gains more than lowering the
    rejected one.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      penalty: the paper's lambda, >= 0; 0 is DPO.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python `penalty` is
        not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import dpop
      >>> zero, both = jnp.zeros(2), jnp.array([2.0, -2.0])
      >>> [f"{x:.4f}" for x in dpop(both, both, zero, zero)]
      ['0.6931', '30.0000']

    References:
      Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with
      DPO-Positive", 2024, arXiv:2402.13228, the DPOP loss.
    """
    _common.not_negative("penalty", penalty)
    chosen, rejected = _rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    # relu has a gradient of 0 at 0, where training starts; maximum has 1/2.
    lost = jnp.asarray(penalty, chosen.dtype) * jax.nn.relu(-chosen)
    return _common.logistic_loss(chosen - rejected - lost)


def flex_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    chosen_beta: Scalar,
    rejected_beta: Scalar,
) -> PerPair:
    """Flex-DPO: one beta for the chosen answer and another for the rejected one.

        loss = -log s(chosen_beta a_w - rejected_beta a_l)

    DPO's gradients in the two log-probs are equal and opposite; here their ratio is
    chosen_beta / rejected_beta.  A `rejected_beta` below `chosen_beta` keeps the
    rejected answer from falling so fast that the chosen one stops rising.  The paper
    does not recommend values.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_beta: the paper's beta+, > 0.
      rejected_beta: the paper's beta-, > 0; if equal to `chosen_beta`, this is DPO.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python beta is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import flex_dpo
      >>> zero, both = jnp.zeros(2), jnp.array([0.0, 40.0])
      >>> loss = flex_dpo(both, both, zero, zero, chosen_beta=0.1, rejected_beta=0.05)
      >>> [f"{x:.4f}" for x in loss]
      ['0.6931', '0.1269']

    References:
      Yan et al., "3D-Properties: Identifying Challenges in DPO and Charting a Path
      Forward", 2024, arXiv:2406.07327, the adaptive beta of Section 4.3.  The paper
      describes beta+ and beta- in words; the equation is DPO's with each in its place.
    """
    _common.positive("chosen_beta", chosen_beta)
    _common.positive("rejected_beta", rejected_beta)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    chosen = jnp.asarray(chosen_beta, chosen.dtype) * chosen
    rejected = jnp.asarray(rejected_beta, rejected.dtype) * rejected
    return _common.logistic_loss(chosen - rejected)


def _rewards(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
) -> tuple[jax.Array, jax.Array]:
    """The implicit reward of each answer, beta log pi/ref."""
    _common.positive("beta", beta)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    beta = jnp.asarray(beta, chosen.dtype)
    return beta * chosen, beta * rejected
