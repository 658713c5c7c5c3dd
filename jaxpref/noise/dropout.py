"""Monte Carlo dropout of a reward head: one mask for all answers to a prompt.

A pair's margin is uncertain if it depends on few features.  With a mask of its own for
each answer, even two equal answers would seem to differ; what they have in common only
cancels if both lose the same features.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxpref.noise._common import floating

__all__ = ["dropout_rewards", "record_keys"]

AT_ONCE = 64
"""Prompts whose masks are in memory together."""


def record_keys(
    seed: int, records: UInt32[Array, " prompts"]
) -> Key[Array, " prompts"]:
    """A random key for each prompt.

    It depends on the seed and the record alone, so that masks do not depend on the
    number of records, their order, or how they are distributed.

    Args:
      seed: the seed.
      records: a number of each record, such as the hash of its content.
    """
    base = jax.random.key(seed)
    return jax.vmap(lambda record: jax.random.fold_in(base, record))(records)


def dropout_rewards(
    features: Float[Array, "prompts answers D"],
    head: Float[Array, " D"],
    keys: Key[Array, " prompts"],
    *,
    rate: float = 0.1,
    passes: int = 10,
) -> Float[Array, "passes prompts answers"]:
    """Rewards with dropout on the input of a linear head.

        out[t, i, k] = sum_d m[t, i, d] / (1 - rate) features[i, k, d] head[d]

    with independent m[t, i, d], 1 with probability 1 - rate and else 0.  The masks are
    shared by the answers k to a prompt, so a margin has the variance
    rate / (1 - rate) sum_d ((features[i, 0, d] - features[i, 1, d]) head[d])^2, which
    is 0 for equal answers.  The mean over passes tends to the reward without dropout.
    The backbone, which is trained without dropout, runs once: this is the uncertainty
    of the head alone.

    Args:
      features: what the head reads of each answer.
      head: the weights of the head.
      keys: a key for each prompt; see `record_keys`.
      rate: the probability of dropping a feature, in [0, 1).
      passes: the number of masks, >= 1.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if `rate` or `passes` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.dropout import dropout_rewards, record_keys
      >>> equal = jnp.array([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]])
      >>> keys = record_keys(0, jnp.array([7], jnp.uint32))
      >>> found = dropout_rewards(equal, jnp.ones(3), keys, rate=0.5)
      >>> print(jnp.std(found[..., 0] - found[..., 1]))
      0.0

    References:
      Wang et al., "Self-Evolutionary Large Language Models through Uncertainty-Enhanced
      Preference Optimization" (UPO), 2024, arXiv:2409.11212: ten passes at a rate of
      0.1, through a model that reads both answers at once.
      Gal and Ghahramani, "Dropout as a Bayesian Approximation", 2015, arXiv:1506.02142.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"Expected rate in [0, 1), got {rate}.")
    if passes < 1:
        raise ValueError(f"Expected passes >= 1, got {passes}.")
    features, head = map(floating, (features, head))
    return _dropout_rewards(features, head, keys, rate, passes)


@functools.partial(jax.jit, static_argnames="passes")
def _dropout_rewards(features, head, keys, rate, passes):
    scaled = head[None] / (1 - rate)

    def of_prompt(one):
        own, key = one
        kept = jax.random.uniform(key, (passes, head.size)) >= rate
        return jnp.einsum("kd,td->tk", own, jnp.where(kept, scaled, 0))

    found = jax.lax.map(of_prompt, (features, keys), batch_size=AT_ONCE)
    return jnp.moveaxis(found, 1, 0)
