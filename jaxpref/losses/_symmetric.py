"""Losses that limit the influence of contradicted pairs without a known flip rate.

If l(h) + l(-h) is constant, the mean of the loss under flips at any rate e < 1/2 is the
clean loss times 1 - 2e plus a constant.  So the noise does not change the minimizer.
`sympo_*` are such losses.  `power_dpo` interpolates between DPO and `sympo_sigmoid`.
In `holder_dpo`, the gradient of a strongly contradicted pair vanishes.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = [
    "holder_dpo",
    "power_dpo",
    "sympo_ramp",
    "sympo_sigmoid",
    "sympo_unhinged",
]


def sympo_sigmoid(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Symmetric preference optimization with the sigmoid loss.

        loss = s(-h)

    Symmetric: loss(h) + loss(-h) = 1, so flips at any rate e < 1/2 only scale the mean
    loss by 1 - 2e and shift it.  Bounded, not convex.  The gradient -s(h) s(-h)
    vanishes on both sides, so a strongly contradicted pair has almost no gradient.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; between 0 and 1.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sympo_sigmoid
      >>> zero, margin = jnp.zeros(3), jnp.array([40.0, 0.0, -40.0])
      >>> print(sympo_sigmoid(margin, zero, zero, zero, beta=1.0).round(4))
      [0.  0.5 1. ]

    References:
      Nishimori et al., "On Symmetric Losses for Robust Policy Optimization with Noisy
      Preferences" (SymPO), 2025, arXiv:2505.24709, the sigmoid loss.
      nissymori/SymPO, alignment/train/loss.py, `sigmoid_loss`.  Clipping the rewards is
      an option there, off by default, and not part of the loss here.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return jax.nn.sigmoid(-h)


def sympo_ramp(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Symmetric preference optimization with the symmetric ramp loss.

        loss = min(1, max(0, (1 - h) / 2))

    Symmetric: loss(h) + loss(-h) = 1, so flips at any rate e < 1/2 only scale the mean
    loss by 1 - 2e and shift it.  The gradient in h is -1/2 for |h| < 1 and 0 beyond
    (-1/4 at |h| = 1): pairs outside the ramp, right or wrong, have no gradient.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; between 0 and 1.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sympo_ramp
      >>> zero, margin = jnp.zeros(4), jnp.array([2.0, 0.5, 0.0, -2.0])
      >>> print(sympo_ramp(margin, zero, zero, zero, beta=1.0))
      [0.   0.25 0.5  1.  ]

    References:
      Nishimori et al., "On Symmetric Losses for Robust Policy Optimization with Noisy
      Preferences" (SymPO), 2025, arXiv:2505.24709, the symmetric ramp loss.
      nissymori/SymPO, alignment/train/loss.py, `symmetric_ramp_loss`.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return jnp.clip(0.5 - 0.5 * h, 0, 1)


def sympo_unhinged(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Symmetric preference optimization with the unhinged loss.

        loss = 1 - h

    Symmetric: loss(h) + loss(-h) = 2, so flips at any rate e < 1/2 only scale the mean
    loss by 1 - 2e and shift it.  Convex and unbounded below: the gradient is the same
    for all margins, so something else must regularize the policy.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; of either sign.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sympo_unhinged
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, -3.0])
      >>> print(sympo_unhinged(margin, zero, zero, zero, beta=1.0))
      [-2.  4.]

    References:
      Nishimori et al., "On Symmetric Losses for Robust Policy Optimization with Noisy
      Preferences" (SymPO), 2025, arXiv:2505.24709, the unhinged loss.
      nissymori/SymPO, alignment/train/loss.py, `unhinged_loss`.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return 1 - h


def power_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    power: Number = 0.7,
) -> PerPair:
    """DPO with the generalized cross-entropy in place of the logarithm.

        loss = (1 - s(h)^q) / q,    q = `power`

    q -> 0 gives DPO, and q = 1 is `sympo_sigmoid`.  Bounded by 1/q.  The gradient in h
    is -s(h)^q s(-h), DPO's times s(h)^q, so it vanishes for a strongly contradicted
    pair.  The loss comes from classification with noisy labels.  Here it is applied to
    the preference probability s(h), independently of any paper on preferences.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      power: q in (0, 1]; larger values are more robust but converge more slowly.

    Returns:
      One loss per pair, [*batch], at least float32; between 0 and 1/q.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0, or a Python `power` is
        outside (0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import power_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([40.0, -40.0])
      >>> print(power_dpo(margin, zero, zero, zero, beta=1.0, power=0.5).round(4))
      [0. 2.]

    References:
      Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural
      Networks with Noisy Labels", 2018, arXiv:1805.07836, the loss L_q, with its q.
    """
    if _common.is_number(power) and not 0 < power <= 1:
        raise ValueError(f"Expected power in (0, 1], got {power}.")
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    q = _common.per_pair("power", power, h)
    # expm1, because 1 - s(h)^q would cancel if s(h) is near 1 or q near 0.
    return -jnp.expm1(q * jax.nn.log_sigmoid(h)) / q


def holder_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    gamma: Number = 2.0,
) -> PerPair:
    """Holder-DPO: the density-power divergence in place of the KL divergence.

        loss = gamma s(h)^(1 + gamma) - (1 + gamma) s(h)^gamma

    Bounded between -1 (the policy agrees with the label) and 0 (it contradicts it).
    Redescending: the gradient in h, -gamma (1 + gamma) s(h)^gamma s(-h)^2, vanishes as
    h decreases, so a strongly contradicted pair is treated as a flip.  Not convex.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      gamma: how fast the gradient of contradicted pairs vanishes, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; between -1 and 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta` or `gamma` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import holder_dpo
      >>> zero, margin = jnp.zeros(3), jnp.array([40.0, 0.0, -40.0])
      >>> print(holder_dpo(margin, zero, zero, zero, beta=1.0).round(4))
      [-1.  -0.5 -0. ]

    References:
      Fujisawa, Adachi and Osborne, "Scalable Valuation of Human Feedback through
      Provably Robust Model Alignment" (Holder-DPO), 2025, arXiv:2505.17859, the
      objective with phi(t) = gamma - (1 + gamma) t and the integral replaced by the
      empirical mean, as in its Appendix D.
    """
    _common.positive("gamma", gamma)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    gamma = _common.per_pair("gamma", gamma, h)
    # s^gamma (gamma s - 1 - gamma), in a form that does not cancel near s = 1.
    return -jnp.exp(gamma * jax.nn.log_sigmoid(h)) * (1 + gamma * jax.nn.sigmoid(-h))
