"""DPO with a weight per pair: how likely the policy is to have generated it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = ["log_collisions", "wpo", "wpo_log_weights"]


def wpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_log_weights: PerPair,
    rejected_log_weights: PerPair,
    *,
    beta: Number = 0.01,
) -> PerPair:
    """Weighted preference optimization: on-policy pairs have more weight.

        loss = -min(1, w_w w_l) log s(h),    no gradient through w

    log w(y) is the mean over tokens of log pi(y_t) - log sum_v pi(v)^2, from
    `wpo_log_weights`.  It is near 0 for an answer sampled from the policy, and far
    below for one that the policy would not generate.  A uniform policy has weight 1.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_log_weights: log w(y_w) under the policy, nats per token; [*batch].
      rejected_log_weights: log w(y_l), the same way; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import wpo
      >>> logps, log_weights = jnp.array([-12.0, -30.0]), jnp.log(jnp.array([0.5, 2.0]))
      >>> print(wpo(logps, logps, logps, logps, log_weights, log_weights))
      [0.1732868 0.6931472]

    References:
      Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024,
      arXiv:2406.11827, with sampled alignment of the weights.
      wzhouad/WPO, scripts/run_wpo.py, for the cap at 1, which TRL's use_weighting does
      not have; training_configs/llama3_instruct.yaml for beta.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    h, chosen, rejected = _common.promoted(
        margins=h,
        chosen_log_weights=chosen_log_weights,
        rejected_log_weights=rejected_log_weights,
    )
    # The cap is applied to the exponent, which prevents overflow.
    weights = jnp.exp(jnp.minimum(chosen + rejected, 0))
    return jax.lax.stop_gradient(weights) * _common.logistic_loss(h)


def wpo_log_weights(
    token_logps: Float[Array, "*batch positions"],
    token_log_collisions: Float[Array, "*batch positions"],
    mask: Bool[Array, "*batch positions"],
) -> Float[Array, "*batch"]:
    """WPO's log-weight of an answer, relative to answers sampled from the policy.

        log w(y) = mean over completion tokens of log pi(y_t) - log sum_v pi(v)^2

    sum_v pi(v)^2 is the mean probability of a sampled token.  So sampled answers have a
    weight of about 1, however peaked the policy is.

    Args:
      token_logps: log pi(y_t) of each target token, nats; [*batch, positions].
      token_log_collisions: log sum_v pi(v)^2 at the same positions, from
        `log_collisions`; [*batch, positions].
      mask: true at completion tokens.  The others are ignored, even if they hold NaN;
        [*batch, positions].

    Returns:
      One log-weight per answer, [*batch], at least float32; 0 where it has no token.

    Raises:
      TypeError: if log-probs are not floating point or `mask` is not boolean.
      ValueError: if shapes differ or have no axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import wpo_log_weights
      >>> uniform = jnp.full(4, -jnp.log(32.0))
      >>> print(wpo_log_weights(uniform, uniform, jnp.ones(4, bool)))
      0.0

    References:
      Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024,
      arXiv:2406.11827, sampled alignment.
      wzhouad/WPO, scripts/run_wpo.py, `get_batch_logps`.
    """
    logps, collisions = _common.promoted(
        token_logps=token_logps, token_log_collisions=token_log_collisions
    )
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"Expected mask to be boolean, got {mask.dtype}.")
    _common.same_shape(token_logps=logps, mask=mask)
    if not logps.ndim:
        raise ValueError("Expected arrays with an axis of positions, got numbers.")
    total = jnp.sum(jnp.where(mask, logps - collisions, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(total.dtype)


def log_collisions(
    logits: Float[Array, "*positions vocabulary"],
) -> Float[Array, "*positions"]:
    """The log-probability that two tokens sampled from one distribution are equal.

        log sum_v pi(v)^2 = logsumexp(2 z) - 2 logsumexp(z),    pi = softmax(z)

    Between -log V (uniform) and 0 (deterministic).  A logit of -inf excludes a token.

    Args:
      logits: z, in any normalization; [*positions, vocabulary].

    Returns:
      One log-probability per position, [*positions], at least float32; <= 0.

    Raises:
      TypeError: if `logits` is not floating point.
      ValueError: if `logits` has no axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import log_collisions
      >>> print(f"{log_collisions(jnp.zeros(4)):.4f}")  # -log 4
      -1.3863

    References:
      Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024,
      arXiv:2406.11827, sampled alignment, its denominator.
    """
    (logits,) = _common.promoted(logits=logits)
    if not logits.ndim:
        raise ValueError("Expected logits with an axis of tokens, got a number.")
    return jax.nn.logsumexp(2 * jax.nn.log_softmax(logits), axis=-1)
