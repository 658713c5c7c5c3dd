"""Advantages: how much better a sampled answer is than expected.

Of groups of answers to one prompt, rewards [*groups, K]; those of single tokens are in
`_token_advantages`.  No gradient flows through advantages: they are numbers of the
samples.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses import _common

__all__ = [
    "centered",
    "group_normalized",
    "informative_groups",
    "leave_one_out",
    "overlong_penalty",
    "unflipped_rewards",
    "win_rates",
]

Groups = Float[Array, "*groups K"]
GroupMask = Bool[Array, "*groups K"] | None


def centered(rewards: Groups, *, where: GroupMask = None) -> Groups:
    """The reward minus the mean of its group.

        A_i = r_i - mean over j of r_j

    1 - 1/K times `leave_one_out`.  Unlike `group_normalized`, it does not give more
    weight to prompts whose answers are nearly all right or nearly all wrong.

    Args:
      rewards: of K answers to each prompt; [*groups, K].
      where: which answers count; [*groups, K].

    Returns:
      One advantage per answer, [*groups, K], at least float32; 0 for answers that do
      not count.

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import centered
      >>> print(centered(jnp.array([1.0, 0.0, 0.0, 1.0])))
      [ 0.5 -0.5 -0.5  0.5]

    References:
      Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", 2025,
      arXiv:2503.20783, where GRPO with these advantages is Dr. GRPO.
    """
    values, real, count = _group(rewards, where)
    mean = jnp.sum(values, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(real, values - mean, 0)


def group_normalized(
    rewards: Groups, *, epsilon: float = 1e-4, where: GroupMask = None
) -> Groups:
    """The reward, standardized within its group.

        A_i = (r_i - mean over j of r_j) / (s + epsilon)

    s is the sample standard deviation of the group (with K - 1).

    Args:
      rewards: of K answers to each prompt; [*groups, K].
      epsilon: prevents a division by zero, > 0.
      where: which answers count; [*groups, K].

    Returns:
      One advantage per answer, [*groups, K], at least float32; 0 in groups of equal
      rewards, and for answers that do not count.

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if shapes differ or a Python `epsilon` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import group_normalized
      >>> print([f"{x:.3f}" for x in group_normalized(jnp.array([1.0, 0.0, 0.0]))])
      ['1.155', '-0.577', '-0.577']

    References:
      Shao et al., "DeepSeekMath", 2024, arXiv:2402.03300, outcome supervision with
      GRPO.
      Code: huggingface/trl, grpo_trainer.py, for the standard deviation and epsilon.
    """
    _common.positive("epsilon", epsilon)
    difference = centered(rewards, where=where)
    _, _, count = _group(rewards, where)
    squares = jnp.sum(jnp.square(difference), axis=-1, keepdims=True)
    return difference / (jnp.sqrt(squares / jnp.maximum(count - 1, 1)) + epsilon)


def leave_one_out(rewards: Groups, *, where: GroupMask = None) -> Groups:
    """The reward minus the mean of the other answers of its group.

        A_i = r_i - mean over j != i of r_j

    The baseline does not depend on the answer itself, so the policy gradient remains
    unbiased.

    Args:
      rewards: of K answers to each prompt; [*groups, K].
      where: which answers count; [*groups, K].

    Returns:
      One advantage per answer, [*groups, K], at least float32; 0 for answers that do
      not count, and in groups of one.

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import leave_one_out
      >>> print(leave_one_out(jnp.array([1.0, 0.0, 0.0])))
      [ 1.  -0.5 -0.5]

    References:
      Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for
      Learning from Human Feedback in LLMs" (RLOO), 2024, arXiv:2402.14740.
    """
    values, real, count = _group(rewards, where)
    others = jnp.sum(values, axis=-1, keepdims=True) - values
    difference = values - others / jnp.maximum(count - 1, 1)
    return jnp.where(real & (count > 1), difference, 0)


def informative_groups(
    rewards: Groups, *, where: GroupMask = None
) -> Bool[Array, "*groups"]:
    """Whether the answers of a group have different rewards.

        max over i of r_i  >  min over i of r_i

    Groups of equal rewards have no advantage and no gradient; DAPO leaves them out.

    Args:
      rewards: of K answers to each prompt; [*groups, K].
      where: which answers count; [*groups, K].

    Returns:
      One truth value per group, [*groups].

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import informative_groups
      >>> print(informative_groups(jnp.array([[1.0, 0.0], [1.0, 1.0]])))
      [ True False]

    References:
      Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
      2025, arXiv:2503.14476, Eq. 11.
    """
    values, real, _ = _group(rewards, where)
    most = jnp.max(jnp.where(real, values, -jnp.inf), axis=-1)
    least = jnp.min(jnp.where(real, values, jnp.inf), axis=-1)
    return most > least


def overlong_penalty(
    lengths: _common.Lengths, *, longest: int, buffer: int
) -> Float[Array, "*batch"]:
    """DAPO's penalty of answers that are nearly too long, to be added to the reward.

        0                                      if |y| <= longest - buffer
        (longest - buffer - |y|) / buffer      if longest - buffer < |y| <= longest
        -1                                     if longest < |y|

    Args:
      lengths: |y|, tokens of each answer; [*batch].
      longest: the length from which the penalty is 1, in tokens.
      buffer: tokens before it over which the penalty grows, from 1 to `longest`.

    Returns:
      One penalty per answer, [*batch], float32, from -1 to 0.

    Raises:
      ValueError: if `buffer` is not from 1 to `longest`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import overlong_penalty
      >>> print(overlong_penalty(jnp.array([10, 15, 30]), longest=20, buffer=10))
      [ 0.  -0.5 -1. ]

    References:
      Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
      2025, arXiv:2503.14476, Eq. 13.
    """
    if not 1 <= buffer <= longest:
        raise ValueError(f"Expected buffer from 1 to {longest}, got {buffer}.")
    lengths = jnp.asarray(lengths, jnp.float32)
    # + 0.0 turns the -0 of short answers into 0.
    return jnp.clip((longest - buffer - lengths) / buffer, -1.0, 0.0) + 0.0


def unflipped_rewards(
    rewards: Float[Array, "*batch"],
    *,
    false_positive_rate: _common.Number = 0.0,
    false_negative_rate: _common.Number = 0.0,
) -> Float[Array, "*batch"]:
    """An unbiased estimate of a binary reward, from that of an unreliable verifier.

        (r - e0) / (1 - e0 - e1)

    e0 is the probability that a wrong answer gets reward 1, e1 that a right one gets 0.
    The policy gradient then has the same mean as with the true rewards, but more
    variance.

    Args:
      rewards: r, 0 or 1; [*batch].
      false_positive_rate: e0, in [0, 1].
      false_negative_rate: e1, in [0, 1]; e0 + e1 < 1.

    Returns:
      One reward per answer, [*batch], at least float32.

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if a Python rate is outside [0, 1], or two Python rates add up to 1 or
        more.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import unflipped_rewards
      >>> print(unflipped_rewards(jnp.array([0.0, 1.0]), false_negative_rate=0.5))
      [0. 2.]

    References:
      Wang, Liu, and Li, "Reinforcement Learning with Perturbed Rewards", 2020,
      arXiv:1810.01032, Eq. 1.
    """
    (rewards,) = _common.promoted(rewards=rewards)
    _common.fraction("false_positive_rate", false_positive_rate)
    _common.fraction("false_negative_rate", false_negative_rate)
    if _common.is_number(false_positive_rate) and _common.is_number(
        false_negative_rate
    ):
        total = false_positive_rate + false_negative_rate
        if total >= 1:
            raise ValueError(f"Expected the sum of both rates below 1, got {total}.")
    e0 = _common.per_pair("false_positive_rate", false_positive_rate, rewards)
    e1 = _common.per_pair("false_negative_rate", false_negative_rate, rewards)
    return (rewards - e0) / (1 - e0 - e1)


def win_rates(rewards: Groups, *, where: GroupMask = None) -> Groups:
    """How often an answer is better than the other answers of its group.

        P_i = mean over j != i of s(r_i - r_j)

    s(r_i - r_j) is the probability that answer i is preferred, if the rewards are those
    of a Bradley-Terry model.  The other answers are samples of the policy, so P_i
    estimates the probability that answer i beats it.

    Args:
      rewards: of K answers to each prompt; [*groups, K].
      where: which answers count; [*groups, K].

    Returns:
      One probability per answer, [*groups, K], at least float32; 1/2 for answers that
      do not count, and in groups of one.

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import win_rates
      >>> [f"{x:.3f}" for x in win_rates(jnp.array([9.0, 9.0, -9.0, -9.0]))]
      ['0.833', '0.833', '0.167', '0.167']

    References:
      Wu et al., "Self-Play Preference Optimization for Language Model Alignment",
      2024, arXiv:2405.00675, the estimate of the win rate from K answers.
    """
    values, real, count = _group(rewards, where)
    wins = jax.nn.sigmoid(values[..., :, None] - values[..., None, :])
    # An answer ties with itself.
    total = jnp.sum(jnp.where(real[..., None, :], wins, 0), axis=-1) - 0.5
    known = real & (count > 1)
    return jnp.where(known, total / jnp.maximum(count - 1, 1), 0.5)


def _group(rewards, where) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards less the first that counts, which count, and their number [*groups, 1].

    Advantages depend on differences alone, and those of equal rewards are exactly 0.
    Means of large rewards are rounded.
    """
    (values,) = _common.promoted(rewards=rewards)
    real = _common.mask(where, values)
    values = jax.lax.stop_gradient(jnp.where(real, values, 0))
    first = jnp.argmax(real, axis=-1, keepdims=True)
    values = values - jnp.take_along_axis(values, first, axis=-1)
    values = jnp.where(real, values, 0)
    count = jnp.sum(real, axis=-1, keepdims=True).astype(values.dtype)
    return values, real, count
