"""The first pass over the pairs: the only one whose margins have not seen the labels.

It ends when one of the first pairs of the run returns.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.objectives.inputs import Inputs
from jaxpref.sharding import replicated

REMEMBERED = 64
"""How many first pairs of a run are recognized."""

State = dict[str, Array]


def before() -> State:
    """The state before the first batch."""
    return {
        "first_pairs": jnp.full(REMEMBERED, -1, jnp.int32),
        "ended": jnp.zeros((), bool),
    }


def follow(inputs: Inputs, state: State) -> State:
    """The state with this batch; `ended` is true if the pass ended before it."""
    pairs = replicated(jnp.asarray(inputs.batch.pair_index)).reshape(-1)
    first = state["first_pairs"]
    returned = jnp.any((pairs[:, None] == first) & (pairs[:, None] >= 0))
    new = jnp.pad(pairs, (0, REMEMBERED), constant_values=-1)[:REMEMBERED]
    return {
        "first_pairs": jnp.where(jnp.all(first < 0), new, first),
        "ended": state["ended"] | returned,
    }
