"""The gradient of an objective: micro-batches, coupled pairs, probes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.data.batch import PreferenceBatch
from jaxpref.objectives.by_vote import by_vote
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import Metrics, Objective, State, weighted_losses
from jaxpref.objectives.probe import Score, probed
from jaxpref.scoring.micro_batches import skipping_empty
from jaxpref.scoring.scores import Scored
from jaxpref.sharding import replicated


def gradient(
    objective: Objective,
    score: Score,
    params: Any,
    batch: PreferenceBatch,
    state: State,
) -> tuple[Any, State, Metrics]:
    """The gradient of the objective on a batch, its next state, and metrics.

    Each micro-batch takes one forward and one backward pass.  If the loss of a pair
    depends on other pairs of the batch, or a penalty on all of its tokens, all
    micro-batches are first scored without gradients.

    Args:
      objective: what is minimized.
      score: computes the scores and totals of a micro-batch.
      params: the parameters.
      batch: the whole batch, [A, R, ...].
      state: the objective's state.

    Returns:
      The gradient in the parameters' dtypes; the next state in the dtypes of `state`;
      and the metrics: `loss`, the penalties in it by name, `nonfinite_pairs`, and what
      the objective logs.
      `nonfinite_pairs` is int [A, R, S V]: the pairs that make the loss non-finite, and
      -1 in place of all others.
    """
    if objective.probe is not None:
        state = probed(objective.probe, objective, score, params, batch, state)
    batch = objective.complete(batch)
    batch = dataclasses.replace(batch, weights=objective.weigh(batch, state))
    unless_empty = skipping_empty(batch)
    ahead = None
    if (objective.couples or objective.penalties) and len(batch.pair_index) > 1:
        forward = unless_empty(lambda _, micro: (None, score(params, micro)))
        _, first = jax.lax.scan(forward, None, batch)
        ahead, coupled_values = _cotangents(objective, first, batch, state)

    @unless_empty
    def backward(total, xs):
        micro, cotangents = xs
        scored, pullback = jax.vjp(lambda p: score(p, micro), params)
        values = None
        if cotangents is None:
            cotangents, values = _cotangents(objective, scored, micro, state)
        (grads,) = pullback(cotangents)
        return jax.tree.map(jnp.add, total, grads), (scored, values)

    # Sum in float32 or wider, whatever dtype the parameters have.
    wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)
    total, (scored, values) = jax.lax.scan(backward, zeros, (batch, ahead))
    values = coupled_values if ahead is not None else values
    count = jnp.maximum(objective.count(batch), 1)
    mean = lambda g, p: (g / count.astype(g.dtype)).astype(p.dtype)
    grads = jax.tree.map(mean, total, params)
    inputs = by_vote(scored.scores, batch)
    penalties = _penalties(objective, scored.totals, batch)
    following, learned = objective.learn(inputs, state)
    # Keep the state's dtypes, whatever the scores' are, so that it can be restored.
    following = jax.tree.map(lambda x, was: x.astype(was.dtype), following, state)
    metrics = {
        "loss": (jnp.sum(values) + _scalar(objective, inputs, state)) / count
        + _weighted(objective, penalties),
        **penalties,
        "nonfinite_pairs": replicated(_nonfinite(objective, inputs, values)),
    }
    return grads, following, metrics | objective.metrics(inputs) | learned


def _cotangents(
    objective: Objective, scored: Scored, batch: PreferenceBatch, state: State
) -> tuple[Any, Array]:
    """The gradient of the summed losses with respect to `scored`, and the losses."""

    def summed(scored):
        inputs = by_vote(scored.scores, batch)
        values = weighted_losses(objective, inputs, state)
        total = jnp.sum(values) + _scalar(objective, inputs, state)
        penalties = _penalties(objective, scored.totals, batch)
        return total + _weighted(objective, penalties) * objective.count(batch), values

    return jax.grad(summed, has_aux=True)(scored)


def _penalties(objective: Objective, totals: Any, batch: PreferenceBatch) -> Metrics:
    """The penalties by name, for the totals of a whole batch or of its only part."""
    if batch.pair_index.ndim == 3:
        totals = jax.tree.map(lambda x: jnp.sum(x, 0), totals)
    return {p.name: p.value(totals) for p in objective.penalties}


def _weighted(objective: Objective, penalties: Metrics) -> Array | float:
    return sum(p.coefficient * penalties[p.name] for p in objective.penalties)


def _scalar(objective: Objective, inputs: Inputs, state: State) -> Array | float:
    """Sum of the micro-batches' scalar terms, each times its number of pairs."""
    if objective.scalar is None:
        return 0.0
    if inputs.batch.pair_index.ndim == 2:
        return objective.scalar(inputs, state) * objective.count(inputs.batch)

    def of_micro(scores, micro):
        return _scalar(objective, Inputs(scores, micro), state)

    return jnp.sum(jax.vmap(of_micro)(inputs.scores, inputs.batch))


def _nonfinite(objective: Objective, inputs: Inputs, values: Array) -> Array:
    """The pairs with a non-finite loss, and -1 in place of all others."""
    pairs = inputs.batch.pair_index
    bad = ~jnp.isfinite(values)
    if objective.couples:
        # One pair can make all losses non-finite.  Report the pairs whose own scores
        # are non-finite, if there are any.
        own = functools.reduce(
            jnp.logical_or,
            (
                jnp.any(~jnp.isfinite(x), axis=tuple(range(pairs.ndim, x.ndim)))
                for x in jax.tree.leaves((inputs.scores, inputs.batch.reference))
                if x.ndim >= pairs.ndim
            ),
        )
        own &= inputs.is_pair
        bad = jnp.where(jnp.any(own), own, bad)
    return jnp.where(bad, pairs, -1)
