"""Pairwise losses that need no reference model."""

import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Pairs, Scalar

__all__ = ["simpo"]


def simpo(
    policy_chosen_logps: Pairs,
    policy_rejected_logps: Pairs,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 0.5,
) -> Pairs:
    """Simple preference optimisation: no reference, average log-probs, a target margin.

        loss = -log s(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma)

    `gamma` is the margin itself, as in the paper's objective, not the ratio gamma/beta
    that the authors tune.  The defaults are those of their training code (ratio 0.25).

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: scale of the rewards, > 0.
      gamma: target reward margin, >= 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, or a Python `beta` is not > 0 or `gamma` not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import simpo
      >>> lengths = jnp.array([4, 10])
      >>> print(simpo(-1.0 * lengths, -2.0 * lengths, lengths, lengths, gamma=2.0))
      [0.6931472 0.6931472]

    References:
      Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward",
      2024, arXiv:2405.14734, the SimPO objective.
    """
    _common.positive("beta", beta)
    _common.not_negative("gamma", gamma)
    chosen, rejected = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
    )
    chosen = _common.per_token(chosen, chosen_lengths, "chosen_lengths")
    rejected = _common.per_token(rejected, rejected_lengths, "rejected_lengths")
    beta, gamma = (jnp.asarray(option, chosen.dtype) for option in (beta, gamma))
    return _common.logistic_loss(beta * (chosen - rejected) - gamma)
