"""Advantages of the tokens of sampled answers, with a learned value function.

No gradient flows through advantages: they are numbers of the samples.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses import _common

__all__ = ["gae", "whitened"]


def gae(
    rewards: Float[Array, "*batch T"],
    values: Float[Array, "*batch T"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
    completions: Int[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    """Generalized advantage estimation over the tokens of an answer.

        A_t = sum over l >= 0 of (discount trace)^l d_{t+l}
        d_t = r_t + discount V_{t+1} - V_t,    V = 0 after the last token

    trace = 1 gives the return minus the value, trace = 0 the one-step error.  Adding
    the values gives the returns that the value function is fitted to.

    Args:
      rewards: r_t, received for token t; [*batch, T].
      values: V_t, the value before token t; [*batch, T].
      discount: of later rewards, in [0, 1].
      trace: lambda, the decay of the trace, in [0, 1].
      completions: index of the answer that each token belongs to, -1 for padding; the
        tokens of an answer are adjacent (default: one answer); [*batch, T].

    Returns:
      One advantage per token, [*batch, T], at least float32; 0 where there is none.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python number is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import gae
      >>> rewards, values = jnp.array([0.0, 0.0, 1.0]), jnp.zeros(3)
      >>> print(gae(rewards, values, trace=0.5))
      [0.25 0.5  1.  ]

    References:
      Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
      Estimation", 2015, arXiv:1506.02438, Eqs. 11 and 16.
    """
    _common.fraction("discount", discount)
    _common.fraction("trace", trace)
    rewards, values = _common.promoted(rewards=rewards, values=values)
    owners = jnp.zeros_like(rewards, jnp.int32)
    if completions is not None:
        _common.same_shape(rewards=rewards, completions=completions)
        owners = jnp.asarray(completions)
    real = owners >= 0
    rewards, values = jax.lax.stop_gradient(
        (jnp.where(real, rewards, 0), jnp.where(real, values, 0))
    )
    shifted = lambda x, last: jnp.concatenate(
        [x[..., 1:], jnp.full_like(x[..., :1], last)], axis=-1
    )
    # Nothing flows back from the next answer of a row.
    goes_on = (shifted(owners, -1) == owners).astype(values.dtype)
    errors = rewards + discount * goes_on * shifted(values, 0) - values

    def before(advantage, token):
        error, goes_on = token
        advantage = error + discount * trace * goes_on * advantage
        return advantage, advantage

    of_token = tuple(jnp.moveaxis(x, -1, 0) for x in (errors, goes_on))
    last = jnp.zeros_like(of_token[0][0])
    _, found = jax.lax.scan(before, last, of_token, reverse=True)
    return jnp.where(real, jnp.moveaxis(found, 0, -1), 0)


def whitened(
    advantages: Float[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    epsilon: float = 1e-8,
) -> Float[Array, "*batch"]:
    """Advantages, standardized over all tokens of a batch.

        (A - m) / sqrt(v + epsilon)

    with the mean m and the variance v of the tokens that count.  The size of the
    gradient then does not depend on that of the rewards.  Unlike `group_normalized`, it
    does not change the weights of prompts relative to each other.

    Args:
      advantages: A of each token of the global batch; [*batch].
      where: which tokens count; [*batch].
      epsilon: prevents a division by zero, > 0.

    Returns:
      One advantage per token, [*batch], at least float32; 0 for tokens that do not
      count, and if all are equal up to rounding (v <= 1e-10 times the mean square).

    Raises:
      TypeError: if `advantages` is not floating point.
      ValueError: if shapes differ or a Python `epsilon` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import whitened
      >>> print([f"{x:.3f}" for x in whitened(jnp.array([2.0, 0.0, 1.0]))])
      ['1.225', '-1.225', '0.000']

    References:
      Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019,
      arXiv:1909.08593, whose code whitens advantages; Huang et al., "The N+
      Implementation Details of RLHF with PPO", 2024, arXiv:2403.17031.
      Code: huggingface/trl, ppo_trainer.py; OpenRLHF, experience_maker.py.
    """
    _common.positive("epsilon", epsilon)
    (values,) = _common.promoted(advantages=advantages)
    real = _common.mask(where, values)
    values = jax.lax.stop_gradient(jnp.where(real, values, 0))
    count = jnp.maximum(jnp.sum(real), 1).astype(values.dtype)
    centered = lambda x: jnp.where(real, x - jnp.sum(x) / count, 0)
    difference = centered(centered(values))  # the first mean is rounded
    variance = jnp.sum(jnp.square(difference)) / count
    # A variance this small is that of rounding.
    differ = variance > 1e-10 * jnp.sum(jnp.square(values)) / count
    return jnp.where(differ, difference * jax.lax.rsqrt(variance + epsilon), 0)
