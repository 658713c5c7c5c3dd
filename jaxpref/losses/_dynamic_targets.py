"""gamma-PO: pairwise losses whose target margins adapt to the batch."""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Mask, PerPair, Scalar

__all__ = ["gamma_po", "gamma_simpo"]


def gamma_po(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Scalar = 0.1,
    gamma: Scalar,
    tau: Scalar = 10.0,
    where: Mask = None,
) -> PerPair:
    """gamma-PO on DPO: confident pairs get larger target margins than ambiguous ones.

        loss_i = -log s(h_i - (g_i - gamma))

    The target margins g_i >= 0 have mean `gamma`, pass no gradient, and solve

        min_p  mean_i -log s(h_i - g_i) + tau KL(p || uniform),    g_i = gamma N p_i

    for the reward margins h of the batch, with p on the simplex.  So pairs with a large
    margin get a larger target.  DPO has no target, so only the deviation from the mean
    matters here.  gamma = 0 and tau -> infinity give DPO.  The problem is convex, and
    is solved to rounding error on this batch.  The authors take 20 mirror-descent steps
    on this batch and a queue of earlier margins.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      gamma: mean target margin, in units of reward, >= 0.
      tau: weight of the KL term, which keeps the targets close together, > 0.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0; 0 where not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta` or `tau` is not > 0 or `gamma` is
        < 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import gamma_po
      >>> logps = jnp.array([-12.0, -30.0])
      >>> print(gamma_po(logps, logps, logps, logps, gamma=1.0))  # all alike: DPO
      [0.6931472 0.6931472]

    References:
      Sun et al., "Robust Preference Optimization via Dynamic Target Margins"
      (gamma-PO), 2025, arXiv:2506.03690, the dynamic target margin.
      sunjie279/gammaPO, scripts/xpo_trainer.py, "gm-dpo".
    """
    _common.one_number("beta", beta)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    where = _common.mask(where, h)
    h = jnp.where(where, h, 0)
    gamma, targets = _target_margins(h, gamma, tau, where)
    return jnp.where(where, _common.logistic_loss(h - (targets - gamma)), 0)


@_common.reward_per_token
def gamma_simpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Scalar = 10.0,
    gamma: Scalar = 4.0,
    tau: Scalar = 10.0,
    where: Mask = None,
) -> PerPair:
    """gamma-PO on SimPO: a target margin for each pair, with mean `gamma`.

        loss_i = -log s(h_i - g_i)

    h_i is SimPO's difference of average log-probs times beta.  The targets g_i solve
    the problem of `gamma_po` and pass no gradient.  tau -> infinity gives `simpo`.

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: scale of the rewards, > 0.
      gamma: mean target margin, in units of reward, >= 0.
      tau: weight of the KL term, which keeps the targets close together, > 0.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0; 0 where not real.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, or a Python `beta` or `tau` is not > 0 or `gamma` is
        < 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import gamma_simpo
      >>> lengths = jnp.array([4, 10])
      >>> loss = gamma_simpo(-1.0 * lengths, -1.4 * lengths, lengths, lengths)
      >>> [f"{x:.4f}" for x in loss]
      ['0.6931', '0.6931']

    References:
      Sun et al., "Robust Preference Optimization via Dynamic Target Margins"
      (gamma-PO), 2025, arXiv:2506.03690, the dynamic target margin.
      sunjie279/gammaPO, scripts/simpo_trainer.py, "gm-simpo", and training_configs for
      the defaults (Llama-3-8B; `gamma` is gamma_beta_ratio times beta).
    """
    _common.positive("beta", beta)
    chosen, rejected = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
    )
    _common.same_shape(
        policy_chosen_logps=chosen,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    where = _common.mask(where, chosen)
    # Never divide by the length of padding: its gradient could be NaN.
    chosen_lengths = jnp.where(where, chosen_lengths, 1)
    rejected_lengths = jnp.where(where, rejected_lengths, 1)
    chosen = _common.per_token(chosen, chosen_lengths, "chosen_lengths")
    rejected = _common.per_token(rejected, rejected_lengths, "rejected_lengths")
    h = jnp.where(where, _common.scalar("beta", beta, chosen) * (chosen - rejected), 0)
    _, targets = _target_margins(h, gamma, tau, where)
    return jnp.where(where, _common.logistic_loss(h - targets), 0)


def _target_margins(h: jax.Array, gamma, tau, where) -> tuple[jax.Array, jax.Array]:
    """gamma-PO's mean target, and the targets g without gradients.

    Let u = log(N p), so that g = gamma exp(u).  At the solution, all pairs satisfy
    tau u + gamma s(g - h) = v  with the same multiplier v, and mean exp(u) = 1.  The
    first equation gives u for each v, and the second gives v.  Both are increasing, so
    bisection solves them.
    """
    _common.not_negative("gamma", gamma)
    _common.positive("tau", tau)
    gamma, tau = _common.scalar("gamma", gamma, h), _common.scalar("tau", tau, h)
    h = jax.lax.stop_gradient(h)
    # The share p of a pair is at most 1.
    largest = jnp.log(jnp.maximum(jnp.sum(where), 1).astype(h.dtype))

    def log_shares(v):
        too_low = lambda u: tau * u + gamma * jax.nn.sigmoid(gamma * jnp.exp(u) - h) < v
        low, high = (v - gamma) / tau, v / tau
        return _bisect(too_low, jnp.minimum(low, largest), jnp.minimum(high, largest))

    too_low = lambda v: _common.mean(jnp.exp(log_shares(v)), where) < 1
    v = _bisect(too_low, jnp.zeros_like(gamma), gamma)
    shares = jnp.exp(log_shares(v))
    # Normalize, so that the mean is exact despite rounding errors in v.
    mean = jnp.where(jnp.any(where), _common.mean(shares, where), 1)
    return gamma, jax.lax.stop_gradient(gamma * shares / mean)


def _bisect(too_low, low: jax.Array, high: jax.Array) -> jax.Array:
    """The point between `low` and `high` where `too_low` becomes false."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        up = too_low(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    # The loop state needs the shape and sharding of the result.
    like = jnp.zeros_like(low) * too_low(low)
    low, high = low + like, high + like
    steps = jnp.finfo(low.dtype).nmant + 8
    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    return (low + high) / 2
