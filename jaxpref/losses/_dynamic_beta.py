"""beta-DPO: a pairwise loss whose beta adapts to the margins of the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

from jaxpref.losses import _common
from jaxpref.losses._common import Mask, PerPair, Scalar
from jaxpref.sharding import replicated

__all__ = ["beta_dpo", "beta_dpo_selection", "margin_moments"]

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
    beta = _common.scalar("beta", beta, margins)
    alpha = _common.scalar("alpha", alpha, margins)
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
    momentum = _common.scalar("momentum", momentum, margins)

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
    rate = _common.scalar("drop_rate", drop_rate, margins)
    dropped = jnp.ceil(count * rate - 1e-3)
    return where & (place < count - dropped)
