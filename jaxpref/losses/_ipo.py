"""Identity preference optimization: the margin's squared distance from a target."""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, PerPair, Scalar

__all__ = ["ipo", "ipo_averaged"]


def ipo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.1,
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
    beta: Scalar = 0.1,
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
    return jnp.square(margin - 0.5 / jnp.asarray(beta, margin.dtype))
