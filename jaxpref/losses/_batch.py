"""Pairwise losses in which the pairs of a batch are weighted or matched together.

The batch is the global one, regardless of its sharding; only inside `shard_map` or
`pmap` does a function treat the pairs of one device as the batch.  Each function still
returns one number per pair.  Their mean over the real pairs is the paper's batch loss,
in value and in gradient.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Mask, PerPair, Scalar
from jaxpref.sharding import replicated

__all__ = ["aot", "aot_unpaired", "dr_dpo", "kl_dpo"]


def dr_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.1,
    beta_prime: Scalar = 1.0,
    where: Mask = None,
) -> PerPair:
    """Distributionally robustified DPO: down-weights pairs with a large loss.

        batch loss = L = -b' log mean_i exp(-l_i / b'),    l_i = -log s(h_i)
        loss_i     = w_i l_i + b' mean_j w_j log w_j,    w_i = exp((L - l_i) / b')

    without a gradient through w.  The second line is the dual form of the first: it
    reweights the batch to a smaller loss at a cost of b' per nat of KL divergence from
    uniform weights.  The weights are the softmax of -l / b' times the number of pairs.
    So they have mean 1, and loss_i has mean L, in value and gradient.  b' -> infinity
    gives DPO, and b' -> 0 the smallest DPO loss in the batch; L is at most the mean DPO
    loss.  Contradicted pairs lose weight, including flipped labels.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      beta_prime: b' > 0, the cost of non-uniform weights.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, [*batch], at least float32; 0 where not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta` or `beta_prime` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import dr_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([2.0, -2.0])
      >>> print(f"{dr_dpo(margin, zero, zero, zero, beta=1.0).mean():.4f}")  # log 2
      0.6931

    References:
      Wu et al., "Towards Robust Alignment of Language Models: Distributionally
      Robustifying Direct Preference Optimization", 2024, arXiv:2407.07880, the Dr. DPO
      objective.
      junkangwu/Dr_DPO, README.md and trainers.py, "DrDPO".
    """
    _common.positive("beta_prime", beta_prime)
    losses, where = _dpo_losses(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        where,
    )
    cost = _common.scalar("beta_prime", beta_prime, losses)
    fixed = jax.lax.stop_gradient(losses)
    soft_minimum = _soft_minimum(fixed, cost, where)
    weights = jnp.exp((soft_minimum - fixed) / cost)
    # b' log w_i = L - l_i and mean w = 1, so the KL term is L - mean w l.
    kl_term = soft_minimum - _common.mean(weights * fixed, where)
    return jnp.where(where, weights * losses + kl_term, 0)


def kl_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.1,
    tau: Scalar = 1.0,
    max_weight: Scalar = 10.0,
    where: Mask = None,
) -> PerPair:
    """Kullback-Leibler DPO: up-weights pairs with a large loss.

        loss_i = w_i l_i,    l_i = -log s(h_i)
        w_i    = min(exp((l_i - mean l) / tau), max_weight), without a gradient

    Robust to a shift of the preferences, but not to flips: contradicted pairs GAIN
    weight, the opposite of `dr_dpo`.  tau -> infinity gives DPO.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      tau: temperature of the weights, > 0, nats of loss.
      max_weight: upper limit of the weights, > 0.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0; 0 where not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta`, `tau` or `max_weight` is not
        > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_dpo
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(kl_dpo(logps, logps, logps, logps))  # all alike: DPO
      [0.6931472 0.6931472]

    References:
      Xu et al., "Robust LLM Alignment via Distributionally Robust Direct Preference
      Optimization", 2025, arXiv:2502.01930, KLDPO, its tractable form.
      TheBlackCat22/distributionally_robust_dpo, src/kldpo.py, for the cap and tau.
    """
    _common.positive("tau", tau)
    _common.positive("max_weight", max_weight)
    losses, where = _dpo_losses(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        where,
    )
    tau = _common.scalar("tau", tau, losses)
    most = _common.scalar("max_weight", max_weight, losses)
    excess = (losses - _common.mean(losses, where)) / tau
    # The cap is applied to the exponent, which prevents overflow.
    weights = jax.lax.stop_gradient(jnp.exp(jnp.minimum(excess, jnp.log(most))))
    return jnp.where(where, weights * losses, 0)


def aot(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.01,
    where: Mask = None,
) -> PerPair:
    """Alignment via optimal transport, paired: margins matched by rank, not by pair.

        loss_i = -log s(beta (m_i - r_(i)))

    m is the policy's margin log pi(y_w|x) - log pi(y_l|x), r the reference's, and r_(i)
    the reference margin with the same rank in the batch as m_i.  Minimizing the mean
    makes the distribution of margins exceed the reference's, not each single margin.
    The loss is invariant to permutations of the reference margins.  With one pair it is
    DPO.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, at the index of its policy margin, [*batch], at least float32;
      >= 0; 0 where not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import aot
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, 1.0])
      >>> print(aot(margin, zero, margin[::-1], zero))  # a permutation
      [0.6931472 0.6931472]

    References:
      Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal
      Transport", 2024, arXiv:2406.05882, Section 3, paired.
      huggingface/trl, trl/trainer/dpo_trainer.py, "aot", without label smoothing.
    """
    chosen, rejected, reference_chosen, reference_rejected = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    margins = chosen - rejected
    return _rank_losses(margins, reference_chosen - reference_rejected, beta, where)


def aot_unpaired(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.01,
    where: Mask = None,
) -> PerPair:
    """Alignment via optimal transport, unpaired: log-ratios matched by rank.

        loss_i = -log s(beta (a_i - b_(i)))

    a is log pi/ref of the chosen answers, b that of the rejected ones, and b_(i) the
    rejected log-ratio with the same rank in the batch as a_i.  Minimizing the mean
    makes the distribution of chosen rewards exceed that of the rejected ones.  It does
    not matter which answers were paired, so the two sides may be permuted
    independently.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, at the index of its chosen answer, [*batch], at least float32;
      >= 0; 0 where not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import aot_unpaired
      >>> zero, ratios = jnp.zeros(2), jnp.array([3.0, 1.0])
      >>> print(aot_unpaired(ratios, ratios[::-1], zero, zero))
      [0.6931472 0.6931472]

    References:
      Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal
      Transport", 2024, arXiv:2406.05882, Section 3, unpaired.
      huggingface/trl, trl/trainer/dpo_trainer.py, "aot_unpaired", without label
      smoothing.
    """
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return _rank_losses(chosen, rejected, beta, where)


def _dpo_losses(chosen, rejected, reference_chosen, reference_rejected, beta, where):
    """DPO losses, log 2 where not real, and the mask."""
    _common.one_number("beta", beta)
    h = _common.reward_margin(
        chosen, rejected, reference_chosen, reference_rejected, beta
    )
    where = _common.mask(where, h)
    # Masked before the nonlinearity, so that padding cannot cause NaN gradients.
    return _common.logistic_loss(jnp.where(where, h, 0)), where


def _soft_minimum(losses: jax.Array, cost: jax.Array, where: jax.Array) -> jax.Array:
    """-b' log mean exp(-l / b') of the real losses; 0 if there is none."""
    least = jnp.min(losses, initial=jnp.inf, where=where)
    least = jnp.where(jnp.any(where), least, 0)
    fall = (least - losses) / cost
    # Near uniform weights, log1p keeps the precision that the factor `cost` needs; far
    # from them, the plain mean does not cancel.
    near = _common.mean(jnp.expm1(fall), where)
    far = _common.mean(jnp.exp(fall), where)
    return least - cost * jnp.where(near > -0.5, jnp.log1p(near), jnp.log(far))


def _rank_losses(values: jax.Array, others: jax.Array, beta, where) -> jax.Array:
    """-log s(beta (value - other)), with `other` of the same rank among real pairs."""
    _common.positive("beta", beta)
    where = _common.mask(where, values)
    # Padding sorts last.
    flat = lambda x: replicated(jnp.where(where, x, jnp.inf)).reshape(-1)
    ranks = jnp.argsort(jnp.argsort(flat(values)))
    matched = jnp.sort(flat(others))[ranks].reshape(values.shape)
    gap = jnp.where(where, values - matched, 0)
    losses = _common.logistic_loss(_common.scalar("beta", beta, values) * gap)
    return jnp.where(where, losses, 0)
