"""Losses of single answers that are labeled desirable or undesirable (unpaired).

Means that couple the answers of a batch are separate functions (`kto_kl`, `bco_shift`).
So each loss is one number per answer, and a caller may use running means instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses import _common
from jaxpref.losses._common import Mask, PerPair, Scalar

__all__ = ["apo_zero_unpaired", "bco", "bco_shift", "kto", "kto_kl", "udm_weights"]

Labels = Bool[Array, "*batch"]
"""Whether each answer is desirable."""


def kto(
    policy_logps: PerPair,
    reference_logps: PerPair,
    desirable: Labels,
    kl: Scalar,
    *,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> PerPair:
    """Kahneman-Tversky optimization: gains and losses relative to a reference point.

        loss = w_D (1 - s(beta (a - z)))  if desirable
               w_U (1 - s(beta (z - a)))  if not,    a = log pi(y|x)/ref(y|x)

    The reference point z is `kl`, an estimate of KL(pi || ref) from mismatched answers
    (see `kto_kl`); no gradient flows through it.  Bounded: the gradient vanishes far
    from z on either side, including that of mislabeled answers.  The authors recommend
    weights such that w_D n_D / (w_U n_U) is in [1, 4/3].

    Args:
      policy_logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      reference_logps: log ref(y|x) under the frozen reference; [*batch].
      desirable: whether the answer is desirable; [*batch].
      kl: the reference point z in nats, >= 0; one number for all.
      beta: steepness, > 0.
      desirable_weight: w_D, >= 0.
      undesirable_weight: w_U, >= 0.

    Returns:
      One loss per answer, [*batch], at least float32; between 0 and its weight.

    Raises:
      TypeError: if log-probs are not floating point or `desirable` not boolean.
      ValueError: if shapes differ, `kl` is not one number, or a Python `beta` is not
        > 0, or a weight or `kl` not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kto
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(kto(logps, logps, jnp.array([True, False]), 0.0))
      [0.5 0.5]

    References:
      Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization",
      2024, arXiv:2402.01306, Eq. 7.
      Code: huggingface/trl, trl/trainer/kto_trainer.py, "kto".
    """
    _common.not_negative("kl", kl)
    _common.not_negative("desirable_weight", desirable_weight)
    _common.not_negative("undesirable_weight", undesirable_weight)
    value = _signed(policy_logps, reference_logps, desirable, beta, kl=kl)
    w_d, w_u = (
        _common.scalar(name, weight, value)
        for name, weight in (
            ("desirable_weight", desirable_weight),
            ("undesirable_weight", undesirable_weight),
        )
    )
    # 1 - s(v) is computed as s(-v), which does not round to 0.
    return jnp.where(jnp.asarray(desirable), w_d, w_u) * jax.nn.sigmoid(-value)


def kto_kl(
    policy_mismatched_logps: PerPair,
    reference_mismatched_logps: PerPair,
    *,
    where: Mask = None,
) -> Float[Array, ""]:
    """The reference point of `kto`: mean log-ratio of answers to other prompts.

        out = max(0, mean of log pi(y'|x)/ref(y'|x)),    y' an answer to another prompt

    The mean is over the real answers of the global batch, and under `jit` over all
    devices.  No gradient flows through it.

    Args:
      policy_mismatched_logps: log pi(y'|x) summed over completion tokens; [*batch].
      reference_mismatched_logps: log ref(y'|x), the same way; [*batch].
      where: which answers are real; None if all are; [*batch].

    Returns:
      One number in nats, [], at least float32; >= 0, and 0 if no answer is real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kto_kl
      >>> print(kto_kl(jnp.array([-10.0, -30.0]), jnp.array([-12.0, -31.0])))
      1.5

    References:
      Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization",
      2024, arXiv:2402.01306, the reference point z_0.
      Code: huggingface/trl, trl/trainer/kto_trainer.py, "kl".
    """
    policy, reference = _common.promoted(
        policy_mismatched_logps=policy_mismatched_logps,
        reference_mismatched_logps=reference_mismatched_logps,
    )
    ratios = jax.lax.stop_gradient(policy - reference)
    return jnp.maximum(_common.mean(ratios, _common.mask(where, ratios)), 0)


def apo_zero_unpaired(
    policy_logps: PerPair,
    reference_logps: PerPair,
    desirable: Labels,
    *,
    beta: Scalar = 0.1,
) -> PerPair:
    """Anchored preference optimization of single answers: KTO with reference point 0.

        loss = 1 - s(beta a) if desirable, s(beta a) if not,    a = log pi(y|x)/ref(y|x)

    Desirable answers should become more likely than under the reference, the others
    less likely.  The losses of a pair's two answers sum to the paired loss.  Bounded.

    Args:
      policy_logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      reference_logps: log ref(y|x) under the frozen reference; [*batch].
      desirable: whether the answer is desirable; [*batch].
      beta: steepness, > 0.

    Returns:
      One loss per answer, [*batch], at least float32; between 0 and 1.

    Raises:
      TypeError: if log-probs are not floating point or `desirable` not boolean.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import apo_zero_unpaired
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(apo_zero_unpaired(logps, logps, jnp.array([True, False])))
      [0.5 0.5]

    References:
      D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions:
      Addressing Underspecification in Alignment", 2024, arXiv:2408.06266, APO-zero,
      Eq. 7.
      Code: huggingface/trl, trl/trainer/kto_trainer.py, "apo_zero_unpaired".
    """
    value = _signed(policy_logps, reference_logps, desirable, beta)
    return jax.nn.sigmoid(-value)


def bco(
    policy_logps: PerPair,
    reference_logps: PerPair,
    desirable: Labels,
    running_shift: Scalar,
    *,
    beta: Scalar = 0.01,
) -> PerPair:
    """Binary classifier optimization: cross-entropy of shifted implicit rewards.

        loss = -log s(r - d) if desirable, -log s(d - r) if not,    r = beta log pi/ref

    For any shift d, the losses of a pair's two answers sum to more than its DPO loss.
    The gap is smallest at d = (r_w + r_l) / 2, which motivates `bco_shift`.  No
    gradient flows through d.  Unlike `kto`, the loss is unbounded: the gradient of
    mislabeled answers does not vanish.

    Args:
      policy_logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      reference_logps: log ref(y|x) under the frozen reference; [*batch].
      desirable: whether the answer is desirable; [*batch].
      running_shift: d, in the unit of the rewards r; one number for all.
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per answer, [*batch], at least float32; >= 0.  Multiply those of
      undesirable answers by `udm_weights` where prompts differ between the classes.

    Raises:
      TypeError: if log-probs are not floating point or `desirable` not boolean.
      ValueError: if shapes differ, `running_shift` is not one number, or a Python
        `beta` is not > 0 or `running_shift` not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import bco
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(bco(logps, logps, jnp.array([True, False]), 0.0))
      [0.6931472 0.6931472]

    References:
      Jung et al., "Binary Classifier Optimization for Large Language Model Alignment",
      2024, arXiv:2404.04656, the BCO objective with reward shift.
      Code: huggingface/trl, trl/trainer/bco_trainer.py, `bco_loss`.
    """
    _common.finite("running_shift", running_shift)
    value = _signed(
        policy_logps, reference_logps, desirable, beta, running_shift=running_shift
    )
    return _common.logistic_loss(value)


def bco_shift(
    rewards: PerPair, desirable: Labels, *, where: Mask = None
) -> Float[Array, ""]:
    """The reward shift of `bco` for one batch: midway between the class means.

        out = (mean of r over desirable + mean of r over undesirable) / 2

    The authors use an exponential moving average of it.  The means are over the global
    batch, and under `jit` over all devices.  No gradient flows through them.  Both
    classes have the same weight, whatever their sizes (TRL uses one mean of all
    answers).

    Args:
      rewards: implicit rewards, see `implicit_rewards`; [*batch].
      desirable: whether the answer is desirable; [*batch].
      where: which answers are real; None if all are; [*batch].

    Returns:
      One number in the rewards' unit, [], at least float32.  If the batch has only one
      class, that class's mean; 0 if no answer is real.

    Raises:
      TypeError: if `rewards` is not floating point or `desirable` not boolean.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import bco_shift
      >>> rewards = jnp.array([2.0, 4.0, -1.0])
      >>> print(bco_shift(rewards, jnp.array([True, True, False])))
      1.0

    References:
      Jung et al., "Binary Classifier Optimization for Large Language Model Alignment",
      2024, arXiv:2404.04656, the reward shift.
    """
    (rewards,) = _common.promoted(rewards=rewards)
    desirable = _labels(rewards, desirable)
    rewards = jax.lax.stop_gradient(rewards)
    real = _common.mask(where, rewards)
    liked, not_liked = real & desirable, real & ~desirable
    total = _common.mean(rewards, liked) + _common.mean(rewards, not_liked)
    # The mean of an empty class is 0.  It must not halve the other mean.
    return jnp.where(jnp.any(liked) & jnp.any(not_liked), total / 2, total)


def udm_weights(
    probabilities: PerPair, *, low: Scalar = 0.5, high: Scalar = 10.0
) -> PerPair:
    """Weights that match the prompts of undesirable answers to those of desirable ones.

        out = clip(f / (1 - f), low, high),    f = P(x has a desirable answer)

    Underlying distribution matching: f is a classifier's probability that a prompt
    belongs to a desirable answer, and f / (1 - f) is the density ratio of the two
    classes, up to a constant.  No gradient flows through the weights.

    Args:
      probabilities: f of each undesirable answer's prompt, in [0, 1]; [*batch].
      low: the smallest weight, >= 0.
      high: the largest weight, >= `low`.

    Returns:
      One weight per answer, [*batch], at least float32; in [low, high].

    Raises:
      TypeError: if the array is not floating point.
      ValueError: if a Python `low` or `high` is not >= 0, or `high` below `low`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import udm_weights
      >>> print(udm_weights(jnp.array([0.0, 0.5, 0.75, 1.0])))
      [ 0.5  1.   3.  10. ]

    References:
      Jung et al., "Binary Classifier Optimization for Large Language Model Alignment",
      2024, arXiv:2404.04656, underlying distribution matching.
      Code: huggingface/trl, trl/trainer/bco_trainer.py, `_get_udm_weight`.
    """
    _common.not_negative("low", low)
    _common.not_negative("high", high)
    if _common.is_number(low) and _common.is_number(high) and low > high:
        raise ValueError(f"Expected low <= high, got {low} and {high}.")
    (f,) = _common.promoted(probabilities=probabilities)
    low, high = _common.scalar("low", low, f), _common.scalar("high", high, f)
    return jax.lax.stop_gradient(jnp.clip(f / (1 - f), low, high))


def _signed(
    policy_logps,
    reference_logps,
    desirable,
    beta,
    *,
    kl: Any = 0.0,
    running_shift: Any = 0.0,
) -> jax.Array:
    """Computes beta (log pi/ref - kl) - running_shift, negated if undesirable.

    No gradient flows through `kl` and `running_shift`.
    """
    _common.positive("beta", beta)
    policy, reference = _common.promoted(
        policy_logps=policy_logps, reference_logps=reference_logps
    )
    desirable = _labels(policy, desirable)
    kl, shift = (
        jax.lax.stop_gradient(_common.scalar(name, value, policy))
        for name, value in (("kl", kl), ("running_shift", running_shift))
    )
    value = _common.scalar("beta", beta, policy) * (policy - reference - kl) - shift
    return jnp.where(desirable, value, -value)


def _labels(answers: jax.Array, desirable) -> jax.Array:
    """`desirable`, promoted to an array and checked."""
    desirable = jnp.asarray(desirable)
    _common.same_shape(answers=answers, desirable=desirable)
    # Labels of -1 and 1 would both convert to true.
    if desirable.dtype != jnp.bool_:
        raise TypeError(f"Expected desirable to be boolean, got {desirable.dtype}.")
    return desirable
