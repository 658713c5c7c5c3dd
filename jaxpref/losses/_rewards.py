"""Implicit rewards of a policy, reward margins, and accuracies."""

import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import PerPair, Scalar

__all__ = ["implicit_rewards", "reward_accuracies", "reward_margins"]


def implicit_rewards(
    policy_logps: PerPair, reference_logps: PerPair, *, beta: Scalar = 0.1
) -> PerPair:
    """The implicit reward of a policy trained by DPO.

        reward = beta log(pi(y|x) / ref(y|x))

    Determined up to a term that depends only on the prompt and cancels within a pair.

    Args:
      policy_logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      reference_logps: log ref(y|x), the same way; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One reward per completion, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import implicit_rewards
      >>> print(implicit_rewards(jnp.array([-10.0]), jnp.array([-12.0]), beta=0.5))
      [1.]

    References:
      Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, Eq. 5.
    """
    _common.positive("beta", beta)
    policy, reference = _common.promoted(
        policy_logps=policy_logps, reference_logps=reference_logps
    )
    return _common.scalar("beta", beta, policy) * (policy - reference)


def reward_margins(chosen_rewards: PerPair, rejected_rewards: PerPair) -> PerPair:
    """Chosen minus rejected reward.

    Args:
      chosen_rewards: rewards of the chosen answers; [*batch].
      rejected_rewards: rewards of the rejected answers; [*batch].

    Returns:
      One margin per pair in the rewards' unit, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import reward_margins
      >>> print(reward_margins(jnp.array([1.0, 0.5]), jnp.array([0.25, 0.5])))
      [0.75 0.  ]
    """
    return _common.reward_difference(chosen_rewards, rejected_rewards)


def reward_accuracies(chosen_rewards: PerPair, rejected_rewards: PerPair) -> PerPair:
    """Whether each pair is ordered as labeled: 1 yes, 0 no, 1/2 for a tie.

    A tie counts 1/2, so an untrained policy (equal to its reference) scores 1/2, as
    guessing does, rather than 0.

    Args:
      chosen_rewards: rewards of the chosen answers; [*batch].
      rejected_rewards: rewards of the rejected answers; [*batch].

    Returns:
      One of 0, 1/2, 1 per pair, [*batch], at least float32; NaN where a reward is NaN.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import reward_accuracies
      >>> print(reward_accuracies(jnp.array([1.0, 0.5]), jnp.array([0.25, 0.5])))
      [1.  0.5]
    """
    margins = _common.reward_difference(chosen_rewards, rejected_rewards)
    return 0.5 + 0.5 * jnp.sign(margins)
