"""DPO with a margin that treats the chosen and the rejected answer differently.

DPO's loss decreases even if both answers become less likely, as long as the rejected
one does so faster.  The margins here counteract that, in terms of

    a_w   log pi(y_w|x)/ref(y_w|x), the log-ratio of the chosen answer
    a_l   log pi(y_l|x)/ref(y_l|x), the log-ratio of the rejected answer
"""

import jax

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = ["dpop", "flex_dpo"]


def dpop(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.3,
    penalty: Number = 50.0,
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
    chosen, rejected = _common.answer_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    # relu has a gradient of 0 at 0, where training starts; maximum has 1/2.
    lost = _common.per_pair("penalty", penalty, chosen) * jax.nn.relu(-chosen)
    return _common.logistic_loss(chosen - rejected - lost)


def flex_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    chosen_beta: Number,
    rejected_beta: Number,
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
    chosen = _common.per_pair("chosen_beta", chosen_beta, chosen) * chosen
    rejected = _common.per_pair("rejected_beta", rejected_beta, rejected) * rejected
    return _common.logistic_loss(chosen - rejected)
