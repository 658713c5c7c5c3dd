"""Policy gradients: losses of sampled answers with their advantages.

Elementwise, so an element is a token or a whole answer, as the log-probs are.  The
gradient of a loss is that of the expected reward with its sign reversed.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import PerPair

__all__ = [
    "clipped_policy_gradient",
    "clipped_value_error",
    "policy_gradient",
    "preference_score_error",
    "self_play_error",
]


def policy_gradient(
    policy_logps: PerPair, sampler_logps: PerPair, advantages: PerPair
) -> PerPair:
    """The importance-weighted policy gradient, without clipping.

        -(pi / pi_old) A

    On policy, where pi = pi_old, its gradient is that of REINFORCE, -A grad log pi.

    Args:
      policy_logps: log pi of each token or answer, nats; [*batch].
      sampler_logps: log pi_old, under the parameters that sampled it; [*batch].
      advantages: A; [*batch].

    Returns:
      One value per element, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import policy_gradient
      >>> logps = jnp.array([-2.0, -1.0])
      >>> print(policy_gradient(logps, logps, jnp.array([0.5, -0.5])))
      [-0.5  0.5]

    References:
      Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
      Reinforcement Learning", 1992; as the surrogate of Schulman et al., "Proximal
      Policy Optimization Algorithms", 2017, arXiv:1707.06347, Eq. 6.
    """
    ratio, advantages = _ratio(policy_logps, sampler_logps, advantages)
    return -ratio * advantages


def clipped_policy_gradient(
    policy_logps: PerPair,
    sampler_logps: PerPair,
    advantages: PerPair,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PerPair:
    """The clipped surrogate of PPO, with a bound of its own on each side.

        -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A),    w = pi / pi_old

    There is no gradient where the policy has already moved further than the bound in
    the direction of the advantage.  A larger `clip_high` lets unlikely tokens grow
    more (DAPO's clip-higher).

    Args:
      policy_logps: log pi of each token or answer, nats; [*batch].
      sampler_logps: log pi_old, under the parameters that sampled it; [*batch].
      advantages: A; [*batch].
      clip_low: how far below 1 a ratio counts, in [0, 1].
      clip_high: how far above 1 a ratio counts, >= 0.

    Returns:
      One value per element, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python bound is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import clipped_policy_gradient
      >>> policy, sampler = jnp.log(jnp.array([0.4, 0.6])), jnp.log(jnp.ones(2) / 2)
      >>> loss = clipped_policy_gradient(policy, sampler, jnp.ones(2), clip_high=0.1)
      >>> print([f"{x:.1f}" for x in loss])
      ['-0.8', '-1.1']

    References:
      Schulman et al., "Proximal Policy Optimization Algorithms", 2017,
      arXiv:1707.06347, Eq. 7; Yu et al., "DAPO: An Open-Source LLM Reinforcement
      Learning System at Scale", 2025, arXiv:2503.14476, Eq. 10, for two bounds.
    """
    _common.fraction("clip_low", clip_low)
    _common.not_negative("clip_high", clip_high)
    ratio, advantages = _ratio(policy_logps, sampler_logps, advantages)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def clipped_value_error(
    values: PerPair, sampler_values: PerPair, returns: PerPair, *, clip: float = 0.2
) -> PerPair:
    """The squared error of PPO's value function, which moves by at most `clip`.

        max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2

    Args:
      values: V of each token; [*batch].
      sampler_values: V_old, under the parameters that sampled it; [*batch].
      returns: R, the advantage plus V_old; [*batch].
      clip: by how much a value may change, > 0, in units of the reward.

    Returns:
      One value per token, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `clip` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import clipped_value_error
      >>> values, old, returns = jnp.array([0.5]), jnp.array([0.0]), jnp.array([1.0])
      >>> print(f"{clipped_value_error(values, old, returns)[0]:.2f}")
      0.32

    References:
      Schulman et al., "Proximal Policy Optimization Algorithms", 2017,
      arXiv:1707.06347, Eq. 9, with the clipping of the authors' code.
      Code: openai/baselines, ppo2/model.py.
    """
    _common.positive("clip", clip)
    values, old, returns = _common.promoted(
        values=values, sampler_values=sampler_values, returns=returns
    )
    old, returns = jax.lax.stop_gradient((old, returns))
    near = jnp.clip(values, old - clip, old + clip)
    worse = jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))
    return 0.5 * worse


def self_play_error(
    policy_logps: PerPair,
    sampler_logps: PerPair,
    win_rates: PerPair,
    *,
    beta: float = 0.001,
) -> PerPair:
    """SPPO's regression of log-ratios on win rates against the sampler.

        beta d^2 - 2 (P - 1/2) d,    d = log pi(y|x) / pi_old(y|x)

    This is beta times the squared error (d - (P - 1/2) / beta)^2, without the part that
    does not depend on the policy, so it is 0 for pi = pi_old.

    Its minimum over all policies is the step of multiplicative weights toward a Nash
    equilibrium of the preference, up to a normalization that is neglected: P need not
    come from rewards.

    Args:
      policy_logps: log pi(y|x), nats; [*batch].
      sampler_logps: log pi_old(y|x), under the parameters that sampled it; [*batch].
      win_rates: P, the probability that y beats an answer of pi_old; [*batch].
      beta: 1/eta, the inverse length of the step, > 0.

    Returns:
      One value per answer, [*batch], at least float32; its minimum is
      -(P - 1/2)^2 / beta.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import self_play_error
      >>> policy, sampler = jnp.array([-1.0, -1.0]), jnp.array([-1.5, -1.0])
      >>> print(self_play_error(policy, sampler, jnp.array([1.0, 0.9]), beta=1.0))
      [-0.25  0.  ]

    References:
      Wu et al., "Self-Play Preference Optimization for Language Model Alignment",
      2024, arXiv:2405.00675, the objective of Algorithm 1.
    """
    _common.positive("beta", beta)
    policy, sampler, rates = _common.promoted(
        policy_logps=policy_logps, sampler_logps=sampler_logps, win_rates=win_rates
    )
    sampler, rates = jax.lax.stop_gradient((sampler, rates))
    return _step_error(policy, sampler, rates - 0.5, beta)


def preference_score_error(
    policy_logps: PerPair,
    sampler_logps: PerPair,
    scores: PerPair,
    *,
    beta: float = 0.001,
) -> PerPair:
    """GPO's regression of log-ratios on preference scores against the sampler.

        beta d^2 - 2 s d,    d = log pi(y|x) / pi_old(y|x)

    This is beta times the squared error (d - s / beta)^2, without the part that does
    not depend on the policy.  It is `self_play_error` with a score in place of the
    probability, so very good answers count more than good ones.

    Its minimum over all policies is pi_old exp(s / beta), up to a normalization that is
    neglected: the policy that maximizes the mean score against pi_old minus beta times
    the KL divergence from it.  The scores of a general preference model need not come
    from rewards.

    Args:
      policy_logps: log pi(y|x), nats; [*batch].
      sampler_logps: log pi_old(y|x), under the parameters that sampled it; [*batch].
      scores: s, the mean score of y over answers of pi_old, log-odds; [*batch].
      beta: the inverse length of the step, > 0.

    Returns:
      One value per answer, [*batch], at least float32; its minimum is -s^2 / beta.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import preference_score_error
      >>> policy, sampler = jnp.array([-1.0, -1.0]), jnp.array([-1.5, -1.0])
      >>> scores = jnp.array([2.0, 3.0])
      >>> print(preference_score_error(policy, sampler, scores, beta=1.0))
      [-1.75  0.  ]

    References:
      Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for
      Language Model Alignment", 2024, arXiv:2410.02197, General Preference
      Optimization.
    """
    _common.positive("beta", beta)
    policy, sampler, scores = _common.promoted(
        policy_logps=policy_logps, sampler_logps=sampler_logps, scores=scores
    )
    sampler, scores = jax.lax.stop_gradient((sampler, scores))
    return _step_error(policy, sampler, scores, beta)


def _step_error(
    policy: jax.Array, sampler: jax.Array, gains: jax.Array, beta: _common.Number
) -> jax.Array:
    """Beta (log pi/pi_old - gain / beta)^2, less its value for pi = pi_old."""
    ratios = policy - sampler
    return beta * jnp.square(ratios) - 2 * gains * ratios


def _ratio(policy_logps, sampler_logps, advantages) -> tuple[jax.Array, jax.Array]:
    """Pi / pi_old, and the advantages, both promoted; no gradient in the latter."""
    policy, sampler, advantages = _common.promoted(
        policy_logps=policy_logps, sampler_logps=sampler_logps, advantages=advantages
    )
    sampler, advantages = jax.lax.stop_gradient((sampler, advantages))
    return _common.clipped_exp(policy - sampler), advantages
