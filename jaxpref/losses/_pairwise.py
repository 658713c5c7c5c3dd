"""Pairwise losses of the log-ratio margin that assume correct labels."""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = ["discopop", "dove", "dpo", "exo_pair", "hinge"]


def dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Direct preference optimization: the logistic loss of the implicit reward margin.

        loss = -log s(h),    h = beta D

    It equals log 2 if the policy equals the reference.  The gradient in h is -s(-h):
    pairs in the wrong order have the largest gradients, including flipped labels.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.  The caller reduces.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import dpo
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(dpo(logps, logps, logps, logps))
      [0.6931472 0.6931472]

    References:
      Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, Eq. 7.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return _common.logistic_loss(h)


def dove(
    policy_chosen_joint_logps: PerPair,
    policy_rejected_joint_logps: PerPair,
    reference_chosen_joint_logps: PerPair,
    reference_rejected_joint_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """DPO over joint instruction-response pairs, each side with its own instruction.

        loss = -log s(beta log pi(I_w, R_w)/ref(I_w, R_w)
                      - beta log pi(I_l, R_l)/ref(I_l, R_l))

    The equation is DPO's, but the log-probs are sums over the tokens of the instruction
    AND the response.  If both sides have the same instruction, its tokens cancel and
    the loss is `dpo`.

    Args:
      policy_chosen_joint_logps: log pi(I_w, R_w), instruction and response together,
        summed over the tokens of both, nats; [*batch].
      policy_rejected_joint_logps: log pi(I_l, R_l), the same way; [*batch].
      reference_chosen_joint_logps: log ref(I_w, R_w) under the frozen reference;
        [*batch].
      reference_rejected_joint_logps: log ref(I_l, R_l), the same way; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import dove
      >>> instruction, response = jnp.array([-20.0, -9.0]), jnp.array([-12.0, -30.0])
      >>> joint = instruction + response
      >>> print(dove(joint, joint, joint, joint))
      [0.6931472 0.6931472]

    References:
      Bansal et al., "Comparing Bad Apples to Good Oranges: Aligning Large Language
      Models via Joint Preference Optimization", 2024, arXiv:2404.00530, the joint
      preference objective.
      Authors' code: Hritikbansal/dove, a DPO trainer that keeps the prompt's labels.
    """
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (
        _common.promoted(
            policy_chosen_joint_logps=policy_chosen_joint_logps,
            policy_rejected_joint_logps=policy_rejected_joint_logps,
            reference_chosen_joint_logps=reference_chosen_joint_logps,
            reference_rejected_joint_logps=reference_rejected_joint_logps,
        )
    )
    h = _common.reward_margin(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta
    )
    return _common.logistic_loss(h)


def hinge(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.05,
) -> PerPair:
    """Hinge loss of the implicit reward margin: SLiC's loss with DPO's reward.

        loss = max(0, 1 - h),    h = beta D

    Pairs in the right order by a margin of 1 / beta nats have no gradient.  All others
    have the same gradient, including flipped labels.  `beta` is the paper's gamma.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: scale of the implicit reward, > 0; the target margin is 1 / beta nats.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import hinge
      >>> zero, margin = jnp.zeros(3), jnp.array([-10.0, 10.0, 30.0])
      >>> print(hinge(margin, zero, zero, zero))
      [1.5 0.5 0. ]

    References:
      Liu et al., "Statistical Rejection Sampling Improves Preference Optimization"
      (RSO), 2023, arXiv:2309.06657, the hinge-norm loss.
      Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", 2023,
      arXiv:2305.10425, the hinge on log-probs that it normalizes by the reference.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return jnp.maximum(1 - h, 0)


def exo_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 1e-3,
) -> PerPair:
    """Efficient exact optimization on pairs: the reverse KL to a smoothed label.

        loss = KL(q || p),    q = [s(h), s(-h)],    p = [1 - t, t],    h = beta D
             = s(h) log(s(h) / (1 - t)) + s(-h) log(s(-h) / t)

    DPO uses the other direction, KL(p || q).  `label_smoothing` t smooths the target.
    It is not a flip rate, and must not be 0, where the divergence is infinite.  The
    loss is zero only at the margin h = log((1 - t) / t), and bounded by -log t.  The
    gradient in h is s(h) s(-h) (h - log((1 - t) / t)).  It is redescending: a pair that
    the policy strongly contradicts has almost no gradient.  Not convex in h.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, the paper's beta_pi, > 0.
      label_smoothing: t in (0, 1/2), the target's probability of the rejected answer.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0 up to rounding.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python
        `label_smoothing` is outside (0, 1/2).

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import exo_pair
      >>> zero, margin = jnp.zeros(2), jnp.array([0.0, -1000.0])
      >>> [f"{x:.4f}" for x in exo_pair(margin, zero, zero, zero)]
      ['2.7612', '6.9078']

    References:
      Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment",
      2024, arXiv:2402.00856, Eq. 16.
      TRL, trl/trainer/dpo_trainer.py, "exo_pair".
    """
    _common.between("label_smoothing", label_smoothing, 0.0, 0.5)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    smoothing = _common.per_pair("label_smoothing", label_smoothing, h)
    log_chosen, log_rejected = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    return jnp.exp(log_chosen) * (log_chosen - jnp.log1p(-smoothing)) + jnp.exp(
        log_rejected
    ) * (log_rejected - jnp.log(smoothing))


def discopop(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.05,
    tau: Number = 0.05,
) -> PerPair:
    """Discovered preference optimization: the log-ratio modulated loss (LRML).

        loss = (1 - g) (-log s(h)) + g exp(-h),    g = s(h / tau),    h = beta D

    Blends the logistic loss, for pairs in the wrong order, with the exponential loss,
    for pairs in the right order.  Not convex: at h = 0 the two differ (log 2 and 1), so
    the loss rises from a local minimum a few tau below 0 to a local maximum above it.
    A pair in the wrong order has to cross this bump, and may get stuck before it.

    g exp(-h) is computed as one exponential.  For tau <= 1 it never exceeds 1; for
    tau > 1 it grows without bound as h falls, and the exponent is clipped at 80.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      tau: width of the transition from one loss to the other, in units of h, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` or `tau` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import discopop
      >>> zero, margin = jnp.zeros(3), jnp.array([-40.0, 0.0, 40.0])
      >>> [f"{x:.4f}" for x in discopop(margin, zero, zero, zero)]
      ['2.1269', '0.8466', '0.1353']

    References:
      Lu et al., "Discovering Preference Optimization Algorithms with and for Large
      Language Models", 2024, arXiv:2406.08414, Eq. 5.
      TRL, trl/trainer/dpo_trainer.py, "discopop".
    """
    _common.positive("tau", tau)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    gate = h / _common.per_pair("tau", tau, h)
    # A single exponential: s(gate) underflows long before exp(-h) overflows, and 0
    # times infinity is NaN.
    exponential = _common.clipped_exp(jax.nn.log_sigmoid(gate) - h)
    return jax.nn.sigmoid(-gate) * _common.logistic_loss(h) + exponential
