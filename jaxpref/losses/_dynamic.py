"""Pairwise losses whose beta or target margin adapts to the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Mask, PerPair, Scalar
from jaxpref.sharding import replicated

__all__ = [
    "beta_dpo",
    "beta_dpo_selection",
    "gamma_po",
    "gamma_simpo",
    "margin_moments",
]

RandomKey = Key[Array, ""] | UInt32[Array, "2"]


def beta_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    running_mean: Scalar,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 0.6,
    where: Mask = None,
) -> PerPair:
    """beta-DPO: one beta per batch, which increases with the margins of the batch.

        loss_i = -log s(b D_i)
        b      = max(0.001, beta (1 + alpha (mean D - running_mean))), no gradient

    Mean and loss are over the selected pairs.  One step of the authors' algorithm calls
    `margin_moments`, then `beta_dpo_selection`, then this function with the selection
    as `where`.  So the moving moments are updated BEFORE they are used.  alpha = 0
    gives DPO.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      running_mean: moving mean of the margins D in nats, including this batch; [].
      beta: the beta of a batch whose mean margin is `running_mean`, > 0.
      alpha: sensitivity of beta to the batch, per nat of margin, >= 0.
      where: which pairs were selected, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0; 0 where not selected.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, `running_mean` is not one number, a Python `beta` is
        not > 0 or `alpha` is < 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import beta_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, 1.0])
      >>> loss = beta_dpo(margin, zero, zero, zero, 2.0)  # b = beta
      >>> [f"{x:.4f}" for x in loss]
      ['0.5544', '0.6444']

    References:
      Wu et al., "beta-DPO: Direct Preference Optimization with Dynamic beta", 2024,
      arXiv:2407.08639, batch-level dynamic beta.
      junkangwu/beta-DPO, trainers.py, "beta_DPO", and README.md for alpha, there `a`.
    """
    _common.positive("beta", beta)
    _common.not_negative("alpha", alpha)
    chosen, rejected = _common.log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    margins = chosen - rejected
    where = _common.mask(where, margins)
    margins = jnp.where(where, margins, 0)
    expected = _common.scalar("running_mean", running_mean, margins)
    beta, alpha = (jnp.asarray(option, margins.dtype) for option in (beta, alpha))
    excess = _common.mean(margins, where) - expected
    batch_beta = jnp.maximum(beta * (1 + alpha * excess), 1e-3)
    losses = _common.logistic_loss(jax.lax.stop_gradient(batch_beta) * margins)
    return jnp.where(where, losses, 0)


def margin_moments(
    margins: PerPair,
    running_mean: Scalar,
    running_std: Scalar,
    *,
    momentum: Scalar = 0.9,
    where: Mask = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Updates beta-DPO's moving mean and standard deviation with one batch.

        mean' = momentum mean + (1 - momentum) mean D
        std'  = momentum std + (1 - momentum) std D

    std D is the unbiased estimate from the batch, 0 for a single pair.  Both moments
    start at 0 in the authors' code.  A batch without real pairs changes nothing.  No
    gradient flows through the moments.

    Args:
      margins: D, the log-ratio margins in nats, without beta; [*batch].
      running_mean: the moving mean so far; [].
      running_std: the moving standard deviation so far; [].
      momentum: weight of the old value, in [0, 1].
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      The new mean and standard deviation, [], at least float32.

    Raises:
      TypeError: if `margins` is not floating point.
      ValueError: if shapes differ, a moment is not one number, or a Python `momentum`
        is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import margin_moments
      >>> mean, std = margin_moments(jnp.array([1.0, 3.0]), 0.0, 0.0)
      >>> print(f"{mean:.4f} {std:.4f}")
      0.2000 0.1414

    References:
      Wu et al., "beta-DPO: Direct Preference Optimization with Dynamic beta", 2024,
      arXiv:2407.08639, the moving averages.
      junkangwu/beta-DPO, trainers.py, `update_and_sync_tensor_mean`.
    """
    _common.fraction("momentum", momentum)
    (margins,) = _common.promoted(margins=margins)
    where = _common.mask(where, margins)
    mean = _common.mean(margins, where)
    squares = jnp.sum(jnp.where(where, jnp.square(margins - mean), 0))
    freedom = jnp.maximum(jnp.sum(where) - 1, 1).astype(margins.dtype)
    momentum = jnp.asarray(momentum, margins.dtype)

    def updated(name, old, new):
        old = _common.scalar(name, old, margins)
        new = momentum * old + (1 - momentum) * new
        return jax.lax.stop_gradient(jnp.where(jnp.any(where), new, old))

    return (
        updated("running_mean", running_mean, mean),
        updated("running_std", running_std, jnp.sqrt(squares / freedom)),
    )


def beta_dpo_selection(
    margins: PerPair,
    running_mean: Scalar,
    running_std: Scalar,
    key: RandomKey,
    *,
    drop_rate: Scalar = 0.2,
    where: Mask = None,
) -> Bool[Array, "*batch"]:
    """beta-DPO's filter: samples pairs with typical margins, without replacement.

        P(i drawn next)  proportional to  exp(-((D_i - mean) / std)^2 / 2)

    until n - ceil(drop_rate n) of the n real pairs are drawn.  Uses the Gumbel top-k
    trick, which has the same distribution.  So an outlier is drawn last, rather than
    never because its weight underflows.  The noise depends on the position of the pair
    in the global batch, regardless of its sharding.

    Args:
      margins: D, the log-ratio margins in nats, without beta; [*batch].
      running_mean: moving mean of the margins, from `margin_moments`; [].
      running_std: moving standard deviation of the margins; [].
      key: a jax random key.
      drop_rate: fraction of the pairs to drop, in [0, 1].
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      Which pairs were drawn, [*batch]; false where not real.

    Raises:
      TypeError: if `margins` is not floating point.
      ValueError: if shapes differ, a moment is not one number, or a Python `drop_rate`
        is outside [0, 1].

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpref.losses import beta_dpo_selection
      >>> margins = jnp.array([0.0, 1.0, 90.0, -1.0, 0.5])
      >>> print(beta_dpo_selection(margins, 0.0, 1.0, jax.random.key(0)))
      [ True  True False  True  True]

    References:
      Wu et al., "beta-DPO: Direct Preference Optimization with Dynamic beta", 2024,
      arXiv:2407.08639, beta-guided data filtering.
      junkangwu/beta-DPO, trainers.py, "beta_DPO"; its drop_rate is `mode_weight`.
    """
    _common.fraction("drop_rate", drop_rate)
    (margins,) = _common.promoted(margins=margins)
    where = _common.mask(where, margins)
    mean = _common.scalar("running_mean", running_mean, margins)
    std = _common.scalar("running_std", running_std, margins)
    # Equal margins have a standard deviation of 0, and equal probabilities.
    std = jnp.maximum(std, jnp.finfo(margins.dtype).tiny)
    distance = jnp.where(margins == mean, 0, (margins - mean) / std)
    # Clipped, so that the squares of outliers do not overflow to infinity.
    far = jnp.sqrt(jnp.finfo(margins.dtype).max) / 4
    log_weights = -0.5 * jnp.square(jnp.clip(distance, -far, far))
    # Relative to the largest, so that the noise matters even if all are outliers.
    largest = jnp.max(log_weights, initial=-jnp.inf, where=where)
    log_weights = jnp.where(where, log_weights - largest, -jnp.inf)
    scores = replicated(log_weights).reshape(-1)
    noise = jax.random.gumbel(key, scores.shape, scores.dtype)
    place = jnp.argsort(jnp.argsort(-(scores + noise))).reshape(margins.shape)
    count = jnp.sum(where)
    # Minus 0.001, so that 10 * 0.7 in floating point does not round up to 8.
    dropped = jnp.ceil(count * jnp.asarray(drop_rate, margins.dtype) - 1e-3)
    return where & (place < count - dropped)


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
    h = jnp.where(where, jnp.asarray(beta, chosen.dtype) * (chosen - rejected), 0)
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
    gamma, tau = (jnp.asarray(option, h.dtype) for option in (gamma, tau))
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
