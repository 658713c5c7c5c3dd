"""DPO with less length bias: normalized, regularized, or desensitized.

A summed log-ratio grows with the length of the answer, so DPO rewards length.  `ln_dpo`
averages over tokens, `r_dpo` charges a price per token, and `ld_dpo` discounts the
tokens of the longer answer beyond the length of the shorter one.
"""

import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Number, PerPair

__all__ = ["ld_dpo", "length_desensitized", "ln_dpo", "r_dpo"]


@_common.reward_per_token
def ln_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Number = 5.0,
) -> PerPair:
    """Length-normalized DPO: log-ratios averaged over completion tokens.

        loss = -log s(beta (a_w / |y_w| - a_l / |y_l|)),    a = log pi/ref

    It equals log 2 if the policy equals the reference.  Averages are smaller than sums
    by a factor of the length, hence the large default of `beta` (from Tulu 3).

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: inverse temperature of the KL penalty per token, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ln_dpo
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(ln_dpo(logps, logps, logps, logps, lengths, lengths))
      [0.6931472 0.6931472]

    References:
      Lambert et al., "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
      2024, arXiv:2411.15124, length-normalized DPO.
      Authors' code: allenai/open-instruct, docs/tulu3.md (dpo_norm, beta 5); TRL,
      trl/trainer/dpo_trainer.py, "sigmoid_norm".
    """
    _common.positive("beta", beta)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    chosen = _common.per_token(chosen, chosen_lengths, "chosen_lengths")
    rejected = _common.per_token(rejected, rejected_lengths, "rejected_lengths")
    return _common.logistic_loss(
        _common.per_pair("beta", beta, chosen) * (chosen - rejected)
    )


def r_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Number = 0.1,
    alpha: Number,
) -> PerPair:
    """Length-regularized DPO: a price per token is subtracted from the reward.

        loss = -log s(h + alpha (|y_w| - |y_l|)),    h = beta D

    This is DPO for the reward r(x, y) - alpha |y|.  At its optimum, r = beta log pi/ref
    + alpha |y| up to a term that depends only on the prompt, and the logit is the
    difference of r between the answers.  So if the chosen answer is longer, its length
    partly explains the label and the gradient is smaller; if it is shorter, the
    gradient is larger.  alpha = 0 is exactly DPO.  Not to be confused with rDPO, the
    robust loss for flipped labels (`rdpo`).

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_lengths: |y_w|, completion tokens; [*batch].
      rejected_lengths: |y_l|, completion tokens; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      alpha: price of one token in units of reward, >= 0.  It is multiplied by the
        difference in lengths, so even small values matter; tune it to the data.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python `alpha` is
        not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import r_dpo
      >>> logps, long, short = jnp.zeros(1), jnp.array([50]), jnp.array([10])
      >>> [f"{x:.4f}" for x in r_dpo(*[logps] * 4, long, short, alpha=0.05)]
      ['0.1269']

    References:
      Park et al., "Disentangling Length from Quality in Direct Preference
      Optimization", 2024, arXiv:2403.19159, the length-regularized objective; derived
      above from the length-penalized reward.
    """
    _common.not_negative("alpha", alpha)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    _common.same_shape(
        policy_chosen_logps=h,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    # Cast first: differences of unsigned integers would wrap around.
    chosen, rejected = (
        jnp.asarray(lengths, h.dtype) for lengths in (chosen_lengths, rejected_lengths)
    )
    return _common.logistic_loss(
        h + _common.per_pair("alpha", alpha, h) * (chosen - rejected)
    )


def ld_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    policy_chosen_prefix_logps: PerPair,
    policy_rejected_prefix_logps: PerPair,
    reference_chosen_prefix_logps: PerPair,
    reference_rejected_prefix_logps: PerPair,
    *,
    beta: Number = 0.1,
    alpha: Number = 0.5,
) -> PerPair:
    """Length-desensitized DPO: the tail of the longer answer is weighted by alpha.

        loss = -log s(beta (a'_w - a'_l)),    a' = log pi'/ref'
        log pi' = log pi(prefix) + alpha (log pi - log pi(prefix)), likewise for ref

    The prefix consists of the first min(|y_w|, |y_l|) tokens of an answer.  So only the
    tail of the longer answer is discounted, under both policy and reference.  alpha = 1
    gives DPO; alpha = 0 drops the tail.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      policy_chosen_prefix_logps: log pi of the chosen answer's prefix, nats; [*batch].
      policy_rejected_prefix_logps: log pi of the rejected answer's prefix; [*batch].
      reference_chosen_prefix_logps: log ref of the chosen answer's prefix; [*batch].
      reference_rejected_prefix_logps: log ref of the rejected answer's prefix;
        [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      alpha: weight of the tail in [0, 1].  The best value depends on the model; the
        paper suggests starting with 1/2.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python `alpha` is
        outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ld_dpo
      >>> zero, total, prefix = jnp.zeros(1), jnp.array([30.0]), jnp.array([10.0])
      >>> loss = ld_dpo(total, zero, zero, zero, prefix, zero, zero, zero)
      >>> [f"{x:.4f}" for x in loss]  # dpo at a margin of 20 nats, not 30
      ['0.1269']

    References:
      Liu et al., "Length Desensitization in Direct Preference Optimization", 2024,
      arXiv:2409.06411, the length-desensitized likelihood.
      TRL, trl/trainer/dpo_trainer.py, "ld_alpha": the reference is treated the same.
    """
    _common.positive("beta", beta)
    _common.fraction("alpha", alpha)
    # A single check of all eight, so that the error lists all shapes.
    pc, pr, rc, rr, pc_prefix, pr_prefix, rc_prefix, rr_prefix = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        policy_chosen_prefix_logps=policy_chosen_prefix_logps,
        policy_rejected_prefix_logps=policy_rejected_prefix_logps,
        reference_chosen_prefix_logps=reference_chosen_prefix_logps,
        reference_rejected_prefix_logps=reference_rejected_prefix_logps,
    )
    # The discount is linear, so it may be applied to log-ratios.  Subtracting the
    # reference first preserves precision.
    chosen = _discounted(pc - rc, pc_prefix - rc_prefix, alpha)
    rejected = _discounted(pr - rr, pr_prefix - rr_prefix, alpha)
    return _common.logistic_loss(
        _common.per_pair("beta", beta, chosen) * (chosen - rejected)
    )


def length_desensitized(
    logps: PerPair, prefix_logps: PerPair, *, alpha: Number
) -> PerPair:
    """Log-probs in which the tail after the prefix is weighted by alpha.

        out = log pi(prefix) + alpha (log pi - log pi(prefix))

    The transform of `ld_dpo`, for use with any other loss of summed log-probs.

    Args:
      logps: log pi(y|x) summed over all completion tokens, nats; [*batch].
      prefix_logps: log pi summed over the first tokens of the completion, as many as
        the shorter answer of its pair has, nats; [*batch].
      alpha: weight of the tail, in [0, 1]; 1 gives `logps`, 0 gives `prefix_logps`.

    Returns:
      One log-prob per completion in nats, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `alpha` is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import length_desensitized
      >>> print(length_desensitized(jnp.array([-30.0]), jnp.array([-10.0]), alpha=0.5))
      [-20.]

    References:
      Liu et al., "Length Desensitization in Direct Preference Optimization", 2024,
      arXiv:2409.06411, the length-desensitized likelihood.
    """
    _common.fraction("alpha", alpha)
    whole, prefix = _common.promoted(logps=logps, prefix_logps=prefix_logps)
    return _discounted(whole, prefix, alpha)


def _discounted(whole, prefix, alpha):
    """The prefix plus alpha times the tail."""
    return prefix + _common.per_pair("alpha", alpha, whole) * (whole - prefix)
