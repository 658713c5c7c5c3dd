"""DPO under divergences other than the reverse KL.

The KL penalty of RLHF may be replaced by any f-divergence E_ref[f(pi/ref)].  The
optimal policy then has the reward beta f'(pi/ref), up to a term that depends only on
the prompt, and DPO becomes

    loss = -log s(beta f'(u_w) - beta f'(u_l)),    u = pi/ref = exp(a)

Constants in f' cancel.  The reverse KL, f'(u) = log u + 1, gives `dpo` itself.  If f'
is an exponential of the log-ratio a, its exponent is clipped at 80 to prevent overflow
in float32.  A clipped answer has no gradient.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = ["alpha_dpo", "chi_po", "forward_kl_dpo", "js_dpo"]


def forward_kl_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """f-DPO with the forward KL, KL(ref || pi): mass-covering.

        loss = -log s(beta f'(u_w) - beta f'(u_l)),    f'(u) = -1 / u,    u = pi/ref

    The gradient in the log-ratio is proportional to 1/u: large for an answer that has
    become less likely than under the reference, and soon negligible for one that has
    become more likely.  The exponent is clipped at 80: an answer whose log-ratio is
    below -80 nats has no gradient.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: weight of the divergence, > 0; the default is DPO's.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import forward_kl_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([4.0, -4.0])
      >>> [f"{x:.4f}" for x in forward_kl_dpo(margin, zero, zero, zero)]
      ['0.6453', '5.3645']

    References:
      Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with
      Diverse Divergence Constraints", 2023, arXiv:2309.16240, f-DPO, forward KL.
      Authors' code: alecwangcq/f-divergence-dpo, trainers.py, forward_dpo_loss.
    """
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    score = lambda ratio: -_common.clipped_exp(-ratio)
    return _common.logistic_loss(_margin(score(chosen), score(rejected), beta))


def js_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """f-DPO with the Jensen-Shannon divergence.

        loss = -log s(beta f'(u_w) - beta f'(u_l)),    f'(u) = log(2u / (1 + u))

    In terms of the log-ratio a = log u, f' is log 2 + log s(a).  This is like `dpo` for
    answers that have become much less likely.  For answers that have become more
    likely it is bounded by log 2, and the gradient vanishes.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: weight of the divergence, > 0; the default is DPO's.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import js_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([40.0, -40.0])
      >>> [f"{x:.4f}" for x in js_dpo(margin, zero, zero, zero)]
      ['0.6591', '3.9501']

    References:
      Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with
      Diverse Divergence Constraints", 2023, arXiv:2309.16240, f-DPO, Jensen-Shannon.
      Authors' code: alecwangcq/f-divergence-dpo, trainers.py, js_dpo_loss.
    """
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    score = jax.nn.log_sigmoid
    return _common.logistic_loss(_margin(score(chosen), score(rejected), beta))


def alpha_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    alpha: Number,
) -> PerPair:
    """f-DPO with an alpha-divergence: between the reverse and the forward KL.

        loss = -log s(beta f'(u_w) - beta f'(u_l)),    f'(u) = (1 - u^-alpha) / alpha

    alpha -> 0 gives `dpo`, and alpha -> 1 gives `forward_kl_dpo`.  f' is bounded above
    by 1 / alpha and decreases like -u^-alpha.  The exponent is clipped at 80: an answer
    whose log-ratio is below -80 / alpha nats has no gradient.

    `alpha` is the paper's; TRL's `f_alpha_divergence_coef` is 1 - alpha.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: weight of the divergence, > 0; the default is DPO's.
      alpha: order of the divergence, in (0, 1); the paper tries 0.3, 0.5, and 0.7.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python `alpha` is
        outside (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import alpha_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([4.0, -4.0])
      >>> [f"{x:.4f}" for x in alpha_dpo(margin, zero, zero, zero, alpha=0.5)]
      ['0.6104', '1.5236']

    References:
      Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with
      Diverse Divergence Constraints", 2023, arXiv:2309.16240, f-DPO, alpha-divergence.
      Authors' code: alecwangcq/f-divergence-dpo, trainers.py, alpha_dpo_loss.
    """
    _common.between("alpha", alpha, 0.0, 1.0)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    alpha = _common.per_pair("alpha", alpha, chosen)
    # expm1 prevents cancellation for small alpha.
    score = lambda ratio: -jnp.expm1(jnp.minimum(-alpha * ratio, 80)) / alpha
    return _common.logistic_loss(_margin(score(chosen), score(rejected), beta))


def chi_po(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.05,
    max_reward: Number,
) -> PerPair:
    """Chi-squared preference optimization: DPO with the link u + log u.

        loss = -log s(clip(beta f'(u_w) - beta f'(u_l), -2 R, 2 R)),    u = pi/ref
        f'(u) = u + log u,    R = max_reward

    The penalty is the KL plus a chi-squared divergence, which grows with the second
    moment of pi/ref.  This makes it costly to raise an answer far above the reference,
    so the policy stays where the data covers it.  For answers that have become much
    less likely, the loss is like `dpo`.  Pairs beyond the clip on either side have no
    gradient, including strongly contradicted pairs.

    The exponent in u = exp(a) is clipped at 80, which matters only if both log-ratios
    exceed 80 nats.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: weight of the divergence, > 0; the paper reports 0.05 and 0.005.
      max_reward: R, an upper bound on the rewards, > 0; the logit is clipped at twice
        that.  The paper's R_max, for which it gives no value.

    Returns:
      One loss per pair, [*batch], at least float32; in [-log s(2R), -log s(-2R)].

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` or `max_reward` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import chi_po
      >>> zero, margin = jnp.zeros(3), jnp.array([0.0, 2.0, 1000.0])
      >>> [f"{x:.4f}" for x in chi_po(margin, zero, zero, zero, max_reward=1.0)]
      ['0.6931', '0.5053', '0.1269']

    References:
      Huang et al., "Correcting the Mythos of KL-Regularization: Direct Alignment
      without Overoptimization via Chi-Squared Preference Optimization", 2024,
      arXiv:2407.13399, Algorithm 1; the link follows from the module's equation with
      f(u) = (u - 1)^2 / 2 + u log u.
    """
    _common.positive("max_reward", max_reward)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    score = lambda ratio: _common.clipped_exp(ratio) + ratio
    margin = _margin(score(chosen), score(rejected), beta)
    bound = 2 * _common.per_pair("max_reward", max_reward, margin)
    return _common.logistic_loss(jnp.clip(margin, -bound, bound))


def _margin(chosen_scores: jax.Array, rejected_scores: jax.Array, beta) -> jax.Array:
    """The reward margin under the divergence f: beta f'(u_w) - beta f'(u_l)."""
    _common.positive("beta", beta)
    beta = _common.per_pair("beta", beta, chosen_scores)
    return beta * (chosen_scores - rejected_scores)
