"""From scores of pairs to scores of votes: a pair is scored once for all its votes."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.data.batch import PreferenceBatch
from jaxpref.objectives.inputs import Inputs


def by_vote(scores: Any, batch: PreferenceBatch) -> Inputs:
    """What an objective sees of scored pairs: one slot for each vote.

    Vote v on the pair in slot s is in slot s V + v, with the answer that it prefers as
    completion 0.  So every objective treats the votes as it treats separate pairs, and
    its gradients in the scores of a pair are the sums over the pair's votes.

    Args:
      scores: float [..., R, S, 2] by name, or [..., R, S, 2, N] of vectors; by model
        and name if two are trained.
      batch: the batch that was scored, [A, R, ...] or a micro-batch [R, ...].

    Returns:
      The inputs, [..., R, S V]; `batch.votes` remains [..., R, S, V].  Without votes,
      the scores and the batch as they are.
    """
    if batch.votes is None:
        return Inputs(scores, batch)
    votes = jnp.asarray(batch.votes)
    exists = (votes != 0) & (batch.pair_index >= 0)[..., None]
    flat = lambda x: _flat(jnp.asarray(x))

    def of_pairs(values: Any, missing: Any = 0) -> Any:
        return _flat(jnp.where(exists, jnp.asarray(values)[..., None], missing))

    def of_completions(values: Any) -> Any:
        axis = votes.ndim  # of the completions; that of a vector's numbers may follow
        table = jnp.expand_dims(jnp.asarray(values), axis - 1)
        tail = table.ndim - axis
        over = lambda x: jnp.reshape(x, (*x.shape, *(1,) * tail))
        ordered = jnp.where(over(votes < 0), jnp.flip(table, axis), table)
        return _flat(jnp.where(over(exists), ordered, 0), tail)

    fields: dict[str, Any] = {
        "pair_index": of_pairs(batch.pair_index, -1),
        "empty_trace": of_pairs(batch.empty_trace, False),
        "completion_lengths": of_completions(batch.completion_lengths),
        "reference": {name: of_completions(x) for name, x in batch.reference.items()},
        "numbers": {name: flat(x) for name, x in batch.numbers.items()},
        "source": None if batch.source is None else of_pairs(batch.source),
        **{x: flat(getattr(batch, x)) for x in ("is_flipped", "annotator", "weights")},
    }
    return Inputs(
        jax.tree.map(of_completions, scores), dataclasses.replace(batch, **fields)
    )


def of_each_pair(values: Float[Array, "*batch SV"], batch: PreferenceBatch) -> Array:
    """Values of the slots of `by_vote` by pair, [..., S, V]."""
    shape = cast(Array, batch.votes).shape[-2:]
    return jnp.reshape(values, (*values.shape[:-1], *shape))


def votes_on_pair(batch: PreferenceBatch) -> Float[Array, "*batch SV"]:
    """The number of votes on the pair of each slot of `by_vote`; 1 in empty slots."""
    votes = jnp.asarray(batch.votes)
    counts = jnp.maximum(jnp.sum(votes != 0, axis=-1, keepdims=True), 1)
    return _flat(jnp.broadcast_to(counts, votes.shape)).astype(jnp.float32)


def _flat(values: Array, tail: int = 0) -> Array:
    """[..., S, V] plus `tail` axes, with S and V merged."""
    axis = values.ndim - tail - 2
    slots = values.shape[axis] * values.shape[axis + 1]
    return jnp.reshape(values, (*values.shape[:axis], slots, *values.shape[axis + 2 :]))
