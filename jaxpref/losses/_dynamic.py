"""Pairwise losses whose beta or target margin follows the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Mask, Pairs, Scalar
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
    policy_chosen_logps: Pairs,
    policy_rejected_logps: Pairs,
    reference_chosen_logps: Pairs,
    reference_rejected_logps: Pairs,
    running_mean: Scalar,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 0.6,
    where: Mask = None,
) -> Pairs:
    """beta-DPO: a beta for the batch, larger where its margins are larger.

        loss_i = -log s(b D_i)
        b      = max(0.001, beta (1 + alpha (mean D - running_mean))), held fixed

    Mean and loss are over the selected pairs.  One step of the authors' algorithm is
    `margin_moments`, then `beta_dpo_selection`, then this, its `where` the selection:
    the moving moments are updated BEFORE they are used.  alpha = 0 is DPO.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      running_mean: moving mean of the margins D in nats, this batch counted; [].
      beta: the beta of a batch whose margins are as usual, > 0.
      alpha: how far beta follows the batch, per nat of margin, >= 0.
      where: which pairs were selected, [*batch]; None if all are.  What the others hold
        (NaN included) does not matter.

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
      >>> loss = beta_dpo(margin, zero, zero, zero, 2.0)  # a batch as usual: beta
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
    usual = _common.scalar("running_mean", running_mean, margins)
    beta, alpha = (jnp.asarray(option, margins.dtype) for option in (beta, alpha))
    excess = _common.mean(margins, where) - usual
    batch_beta = jnp.maximum(beta * (1 + alpha * excess), 1e-3)
    losses = _common.logistic_loss(jax.lax.stop_gradient(batch_beta) * margins)
    return jnp.where(where, losses, 0)


def margin_moments(
    margins: Pairs,
    running_mean: Scalar,
    running_std: Scalar,
    *,
    momentum: Scalar = 0.9,
    where: Mask = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """beta-DPO's moving mean and standard deviation, one batch further.

        mean' = momentum mean + (1 - momentum) mean D
        std'  = momentum std + (1 - momentum) std D

    std D is the unbiased one of the batch, 0 for a single pair.  Both start at 0 in the
    authors' code.  A batch without a real pair changes nothing.  Held fixed in the
    gradient.

    Args:
      margins: D, the log-ratio margins in nats, without beta; [*batch].
      running_mean: the moving mean so far; [].
      running_std: the moving standard deviation so far; [].
      momentum: the part of the old value that stays, in [0, 1].
      where: which pairs are real, [*batch]; None if all are.  What the others hold
        (NaN included) does not matter.

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
    stays = jnp.asarray(momentum, margins.dtype)

    def moved(name, old, new):
        old = _common.scalar(name, old, margins)
        new = stays * old + (1 - stays) * new
        return jax.lax.stop_gradient(jnp.where(jnp.any(where), new, old))

    return (
        moved("running_mean", running_mean, mean),
        moved("running_std", running_std, jnp.sqrt(squares / freedom)),
    )


def beta_dpo_selection(
    margins: Pairs,
    running_mean: Scalar,
    running_std: Scalar,
    key: RandomKey,
    *,
    drop_rate: Scalar = 0.2,
    where: Mask = None,
) -> Bool[Array, "*batch"]:
    """beta-DPO's filter: keeps pairs whose margin is usual, drawn without replacement.

        P(i drawn next)  proportional to  exp(-((D_i - mean) / std)^2 / 2)

    until n - ceil(drop_rate n) of the n real pairs are drawn.  Drawn as the largest of
    log-weights plus Gumbel noise, which is the same distribution, so a pair far outside
    is drawn last and not, its weight having underflowed, never.  The noise belongs to
    the pair's place in the global batch, however it lies on devices.

    Args:
      margins: D, the log-ratio margins in nats, without beta; [*batch].
      running_mean: moving mean of the margins, as of `margin_moments`; [].
      running_std: moving standard deviation of the margins; [].
      key: a jax random key.
      drop_rate: the part of the pairs that is left out, in [0, 1].
      where: which pairs are real, [*batch]; None if all are.  What the others hold
        (NaN included) does not matter.

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
    # All margins alike give a standard deviation of 0, and an equal chance.
    std = jnp.maximum(std, jnp.finfo(margins.dtype).tiny)
    distance = jnp.where(margins == mean, 0, (margins - mean) / std)
    # Far outside is far outside: squares must not overflow to one infinity for all.
    far = jnp.sqrt(jnp.finfo(margins.dtype).max) / 4
    log_weights = -0.5 * jnp.square(jnp.clip(distance, -far, far))
    # Against the likeliest, so that the noise is not lost where all are far outside.
    likeliest = jnp.max(log_weights, initial=-jnp.inf, where=where)
    log_weights = jnp.where(where, log_weights - likeliest, -jnp.inf)
    scores = replicated(log_weights).reshape(-1)
    noise = jax.random.gumbel(key, scores.shape, scores.dtype)
    place = jnp.argsort(jnp.argsort(-(scores + noise))).reshape(margins.shape)
    count = jnp.sum(where)
    # A thousandth, so that 10 * 0.7 in floats does not round up to 8.
    dropped = jnp.ceil(count * jnp.asarray(drop_rate, margins.dtype) - 1e-3)
    return where & (place < count - dropped)


def gamma_po(
    policy_chosen_logps: Pairs,
    policy_rejected_logps: Pairs,
    reference_chosen_logps: Pairs,
    reference_rejected_logps: Pairs,
    *,
    beta: Scalar = 0.1,
    gamma: Scalar,
    tau: Scalar = 10.0,
    where: Mask = None,
) -> Pairs:
    """gamma-PO on DPO: asks more of confident pairs and less of ambiguous ones.

        loss_i = -log s(h_i - (g_i - gamma))

    The target margins g_i >= 0 have mean `gamma`, are held fixed, and solve for the
    batch's reward margins h

        min_p  mean_i -log s(h_i - g_i) + tau KL(p || uniform),    g_i = gamma N p_i

    with p on the simplex: pairs with a large margin are given a larger target.  DPO has
    no target, so only the departure from the mean counts here.  gamma = 0 and tau ->
    infinity are DPO.  The problem is convex and solved to rounding on this batch; the
    authors take 20 mirror-descent steps on this batch and a queue of earlier margins.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      gamma: mean target margin, in units of reward, >= 0.
      tau: how strongly targets are held together, > 0.
      where: which pairs are real, [*batch]; None if all are.  What the others hold
        (NaN included) does not matter.

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
    policy_chosen_logps: Pairs,
    policy_rejected_logps: Pairs,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Scalar = 10.0,
    gamma: Scalar = 4.0,
    tau: Scalar = 10.0,
    where: Mask = None,
) -> Pairs:
    """gamma-PO on SimPO: a target margin for each pair, with mean `gamma`.

        loss_i = -log s(h_i - g_i)

    h_i is SimPO's difference of average log-probs times beta, and the targets g_i, held
    fixed, solve the problem of `gamma_po`.  tau -> infinity is `simpo`.

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: scale of the rewards, > 0.
      gamma: mean target margin, in units of reward, >= 0.
      tau: how strongly targets are held together, > 0.
      where: which pairs are real, [*batch]; None if all are.  What the others hold
        (NaN included) does not matter.

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
    # A length that is not real must not divide: its quotient's slope could be NaN.
    chosen_lengths = jnp.where(where, chosen_lengths, 1)
    rejected_lengths = jnp.where(where, rejected_lengths, 1)
    chosen = _common.per_token(chosen, chosen_lengths, "chosen_lengths")
    rejected = _common.per_token(rejected, rejected_lengths, "rejected_lengths")
    h = jnp.where(where, jnp.asarray(beta, chosen.dtype) * (chosen - rejected), 0)
    _, targets = _target_margins(h, gamma, tau, where)
    return jnp.where(where, _common.logistic_loss(h - targets), 0)


def _target_margins(h: jax.Array, gamma, tau, where) -> tuple[jax.Array, jax.Array]:
    """gamma-PO's mean target and the targets g, held fixed.

    Where the problem is solved, with u = log(N p) and so g = gamma exp(u), every pair
    has the same slope  tau u + gamma s(g - h) = v,  and mean exp(u) = 1.  The first
    gives u for a v, the second then gives v; both rise, so halving finds them.
    """
    _common.not_negative("gamma", gamma)
    _common.positive("tau", tau)
    gamma, tau = (jnp.asarray(option, h.dtype) for option in (gamma, tau))
    h = jax.lax.stop_gradient(h)
    # No pair can have more than all of the target.
    most = jnp.log(jnp.maximum(jnp.sum(where), 1).astype(h.dtype))

    def logs(slope):
        too_low = lambda u: (
            tau * u + gamma * jax.nn.sigmoid(gamma * jnp.exp(u) - h) < slope
        )
        low, high = (slope - gamma) / tau, slope / tau
        return _halved(too_low, jnp.minimum(low, most), jnp.minimum(high, most))

    too_low = lambda slope: _common.mean(jnp.exp(logs(slope)), where) < 1
    slope = _halved(too_low, jnp.zeros_like(gamma), gamma)
    shares = jnp.exp(logs(slope))
    # The mean to rounding, whatever the slope has lost; 1 where nothing is real.
    mean = jnp.where(jnp.any(where), _common.mean(shares, where), 1)
    return gamma, jax.lax.stop_gradient(gamma * shares / mean)


def _halved(too_low, low: jax.Array, high: jax.Array) -> jax.Array:
    """Where `too_low` turns false between `low` and `high`, to rounding."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        up = too_low(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    # What a loop carries keeps its shape and its layout: those of the answer.
    like = jnp.zeros_like(low) * too_low(low)
    low, high = low + like, high + like
    steps = jnp.finfo(low.dtype).nmant + 8
    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    return (low + high) / 2
