"""Hidden states at random tokens of each answer, for goal-conditioned reward models."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models.layout import SPECS, on_mesh
from jaxpref.sharding import ROWS

SPREAD = P(ROWS, None, None, None, None)


def goal_places(
    batch: PreferenceBatch,
    ends: Int[Array, "rows C"],
    step: Int[Array, ""],
    *,
    count: int,
    seed: int,
) -> Int[Array, "rows C2N"]:
    """Random tokens of each answer: for each of N draws, an earlier and a later one.

    They are two different tokens of the answer, uniform over all pairs of its tokens,
    in order.  So the later one, the goal, is never the first token of the answer, for
    rejected answers too.  Of an answer of one token, both are that token.  The draws
    depend on the seed, the step and the pair only, so they are the same whatever the
    micro-batches and the layout, and after a restart.

    Args:
      batch: a micro-batch, padded or packed.
      ends: the place of each answer's last token; -1 where there is none.
      step: the optimizer step.
      count: N.
      seed: of the draws.

    Returns:
      The places of each row's answers, one answer after the other; 0 where `ends` is
      -1.
    """
    sides = batch.completion_lengths.shape[-1]
    key = jax.random.fold_in(jax.random.key(seed), step)
    pairs = jnp.asarray(batch.pair_index).astype(jnp.uint32)
    draw = lambda pair: jax.random.uniform(
        jax.random.fold_in(key, pair), (sides, count, 2)
    )
    drawn = jax.vmap(jax.vmap(draw))(pairs)
    lengths = jnp.asarray(batch.completion_lengths)[..., None]
    below = lambda x, n: jnp.clip(jnp.floor(x * n), 0, jnp.maximum(n - 1, 0))
    one = below(drawn[..., 0], lengths)
    # One of the other tokens, if there are any.
    other = below(drawn[..., 1], lengths - 1)
    other += (other >= one) & (lengths > 1)
    later, earlier = jnp.maximum(one, other), jnp.minimum(one, other)
    back = lengths[..., None] - 1 - jnp.stack([earlier, later], axis=-1)
    shape = (*ends.shape, count * 2)
    spread = on_mesh(SPECS.hidden)
    back = jnp.reshape(back.astype(ends.dtype), shape, out_sharding=spread)
    found = jnp.maximum(ends[..., None] - back, 0)
    return jnp.reshape(
        found,
        (ends.shape[0], ends.shape[1] * shape[2]),
        out_sharding=on_mesh(SPECS.tokens),
    )


def goal_states(
    batch: PreferenceBatch, states: Float[Array, "rows C2N D"], *, count: int
) -> dict[str, Float[Array, "R S K N D"]]:
    """The states at `goal_places`, by score, in float32 or wider."""
    wide: Any = states.astype(jnp.promote_types(states.dtype, jnp.float32))
    shape = (*batch.completion_lengths.shape, count, 2 * states.shape[-1])
    wide = jnp.reshape(wide, shape, out_sharding=on_mesh(SPREAD))
    source, goal = jnp.split(wide, 2, axis=-1)
    return {"source_states": source, "goal_states": goal}
