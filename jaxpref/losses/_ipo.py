"""Losses with squared distances from a target: IPO's margin, Cal-DPO's rewards."""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Number, PerPair

__all__ = ["cal_dpo", "ipo", "ipo_averaged"]


def cal_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.002,
    calibration: Number = 0.5,
) -> PerPair:
    """Calibrated DPO: also brings each implicit reward to a value of its own.

        loss = -log s(a_w - a_l) + c [(a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2]
        a    = log pi(y|x)/ref(y|x)

    DPO determines only the difference of the two rewards, so both may fall.  Here the
    rewards beta a are drawn to 1/2 and -1/2.  The first term has no `beta`.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse of the difference of the two targets in nats, > 0.
      calibration: c, weight of the squared distances, >= 0; 0 is DPO with beta 1.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0, or a Python
        `calibration` is not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import cal_dpo
      >>> chosen, rejected, zero = jnp.array([5.0]), jnp.array([-5.0]), jnp.zeros(1)
      >>> [f"{x:.6f}" for x in cal_dpo(chosen, rejected, zero, zero, beta=0.1)]
      ['0.000045']

    References:
      Xiao et al., "Cal-DPO: Calibrated Direct Preference Optimization for Language
      Model Alignment", 2024, arXiv:2412.14516.
      Authors' code: tengxiao1/Cal-DPO, scripts/dpo_trainer.py, which has c = 1/2, and
      zephyr-selm/dpo_config_full.yaml.
    """
    _common.positive("beta", beta)
    _common.not_negative("calibration", calibration)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    target = 0.5 / _common.per_pair("beta", beta, chosen)
    distance = jnp.square(chosen - target) + jnp.square(rejected + target)
    weight = _common.per_pair("calibration", calibration, chosen)
    return _common.logistic_loss(chosen - rejected) + weight * distance


def ipo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Identity preference optimization, on summed log-probs as in the paper.

        loss = (D - 1 / (2 beta))^2

    The loss regresses the margin onto a finite target.  `beta` is the paper's tau.
    With sums, the target is the same for short and long answers; `ipo_averaged`
    regresses the per-token margin instead and needs a different `beta`.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: regularization strength (tau), > 0; the target margin is 1 / (2 beta) nats.

    Returns:
      One loss per pair in nats squared, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ipo
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(ipo(logps, logps, logps, logps, beta=0.5))
      [1. 1.]

    References:
      Azar et al., "A General Theoretical Paradigm to Understand Learning from Human
      Preferences", 2023, arXiv:2310.12036v2, Eq. 17.
    """
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return _squared_distance(chosen - rejected, beta)


@_common.reward_per_token
def ipo_averaged(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Identity preference optimization on log-ratios averaged over completion tokens.

        loss = (a_w / |y_w| - a_l / |y_l| - 1 / (2 beta))^2,    a = log pi/ref

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: regularization strength (tau), > 0; the target: 1 / (2 beta) nats per token.

    Returns:
      One loss per pair in (nats per token) squared, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ipo_averaged
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(ipo_averaged(logps + lengths, logps, logps, logps, lengths, lengths))
      [16. 16.]

    References:
      Azar et al., 2023, arXiv:2310.12036v2, Eq. 17, with the per-token average that TRL
      adopted on the authors' advice (trl/trainer/dpo_trainer.py, "ipo").
    """
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    chosen = _common.per_token(chosen, chosen_lengths, "chosen_lengths")
    rejected = _common.per_token(rejected, rejected_lengths, "rejected_lengths")
    return _squared_distance(chosen - rejected, beta)


def _squared_distance(margin: jax.Array, beta) -> jax.Array:
    """(margin - 1 / (2 beta))^2, the loss of both forms of IPO."""
    _common.positive("beta", beta)
    return jnp.square(margin - 0.5 / _common.per_pair("beta", beta, margin))
