"""Contrastive losses of hidden states, for goal-conditioned reward models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses import _common

__all__ = ["goal_contrast"]

States = Float[Array, "*batch N D"]
"""Hidden states at N tokens of one answer."""


def goal_contrast(
    source_states: States, goal_states: States, rejected_goal_states: States
) -> Float[Array, "*batch"]:
    """Contrasts where a chosen answer leads with where the rejected one leads.

        loss = -log p - log(1 - q)
        p = mean_n s(cos(h_n, g_n)),    q = mean_n s(cos(h_n, g'_n))

    h_n are the states at source tokens of the chosen answer, g_n those at later tokens
    of the same answer (its goals), and g'_n those at tokens of the rejected answer.  It
    is added to a loss of reward models.  s(cos) is the estimated probability that a
    source leads to a goal, between s(-1) = 0.27 and s(1) = 0.73.

    Args:
      source_states: h, [*batch, N, D].
      goal_states: g, [*batch, N, D].
      rejected_goal_states: g', [*batch, N, D].

    Returns:
      One loss per pair, [*batch], at least float32, from 2 log(1 + 1/e) = 0.63 to
      2 log(1 + e) = 2.63; 2 log 2 = 1.39 if all states are orthogonal or 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if the shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import goal_contrast
      >>> h, orthogonal = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.0, 1.0]]])
      >>> print(goal_contrast(h, orthogonal, orthogonal))
      [1.3862944]

    References:
      Nath et al., "Learning Goal-Conditioned Representations for Language Reward
      Models", 2024, arXiv:2407.13887, the contrastive objective.
      vaskarnathscale/goal-conditioned-rm, openrlhf/models/loss.py,
      `ContrastiveGoalLoss`, which compares each source with the goals of all draws.
    """
    h, goal, rejected = _common.promoted(
        source_states=source_states,
        goal_states=goal_states,
        rejected_goal_states=rejected_goal_states,
    )
    reached = lambda to: jnp.mean(jax.nn.sigmoid(_cosine(h, to)), axis=-1)
    return -jnp.log(reached(goal)) - jnp.log1p(-reached(rejected))


def _cosine(a: Array, b: Array) -> Array:
    # A state of zeros, as of padding, has no direction; its gradient is 0, too.
    lengths = lambda x: jnp.maximum(jnp.sum(x * x, axis=-1), 1e-12)
    return (
        jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(lengths(a)) * jax.lax.rsqrt(lengths(b))
    )
