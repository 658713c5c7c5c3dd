"""The gradient of an objective: micro-batches, coupled pairs, probes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.data.batch import PreferenceBatch
from jaxpref.gradients import bvpo as sketches
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import (
    GradientProbe,
    Metrics,
    Objective,
    State,
    weighted_losses,
)
from jaxpref.scoring.micro_batches import skipping_empty
from jaxpref.sharding import replicated

Score = Callable[[Any, PreferenceBatch], Any]
"""`(params, micro-batch) -> Scores`: a scorer with `frozen` bound."""


def gradient(
    objective: Objective,
    score: Score,
    params: Any,
    batch: PreferenceBatch,
    state: State,
) -> tuple[Any, State, Metrics]:
    """The gradient of the objective on a batch, its next state, and metrics.

    Each micro-batch takes one forward and one backward pass.  If the loss of a pair
    depends on other pairs of the batch, all micro-batches are first scored without
    gradients.

    Args:
      objective: what is minimized.
      score: computes the scores of a micro-batch.
      params: the parameters.
      batch: the whole batch, [A, R, ...].
      state: the objective's state.

    Returns:
      The gradient in the parameters' dtypes; the next state in the dtypes of `state`;
      and the metrics: `loss`, `nonfinite_pairs`, and what the objective logs.
      `nonfinite_pairs` is int [A, R, S]: the pairs that make the loss non-finite, and
      -1 in place of all others.
    """
    if objective.probe is not None:
        state = _probed(objective.probe, objective, score, params, batch, state)
    weights = objective.weigh(batch, state)
    batch = dataclasses.replace(batch, weights=weights)
    unless_empty = skipping_empty(batch)
    ahead = None
    if objective.couples and len(batch.pair_index) > 1:
        forward = unless_empty(lambda _, micro: (None, score(params, micro)))
        _, first = jax.lax.scan(forward, None, batch)
        ahead, coupled_values = _cotangents(objective, first, batch, state)

    @unless_empty
    def backward(total, xs):
        micro, cotangents = xs
        scores, pullback = jax.vjp(lambda p: score(p, micro), params)
        values = None
        if cotangents is None:
            cotangents, values = _cotangents(objective, scores, micro, state)
        (grads,) = pullback(cotangents)
        return jax.tree.map(jnp.add, total, grads), (scores, values)

    # Sum in float32 or wider, whatever dtype the parameters have.
    wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)
    total, (scores, values) = jax.lax.scan(backward, zeros, (batch, ahead))
    values = coupled_values if ahead is not None else values
    count = jnp.maximum(objective.count(batch), 1)
    mean = lambda g, p: (g / count.astype(g.dtype)).astype(p.dtype)
    grads = jax.tree.map(mean, total, params)
    inputs = Inputs(scores, batch)
    following, learned = objective.learn(inputs, state)
    # Keep the state's dtypes, whatever the scores' are, so that it can be restored.
    following = jax.tree.map(lambda x, was: x.astype(was.dtype), following, state)
    metrics = {
        "loss": (jnp.sum(values) + _scalar(objective, inputs, state)) / count,
        "nonfinite_pairs": replicated(_nonfinite(objective, inputs, values)),
    }
    return grads, following, metrics | objective.metrics(inputs) | learned


def _cotangents(
    objective: Objective, scores, batch: PreferenceBatch, state: State
) -> tuple[Any, Array]:
    """The gradient of the summed losses with respect to the scores, and the losses."""

    def summed(scores):
        inputs = Inputs(scores, batch)
        values = weighted_losses(objective, inputs, state)
        return jnp.sum(values) + _scalar(objective, inputs, state), values

    return jax.grad(summed, has_aux=True)(scores)


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


def _probed(
    probe: GradientProbe,
    objective: Objective,
    score: Score,
    params: Any,
    batch: PreferenceBatch,
    state: State,
) -> State:
    """The state after probing the gradients of single pairs, if a probe is due."""

    def learn(params, batch, state):
        projections = _projections(
            objective, score, params, batch, state, probe.key(state)
        )
        return probe.learn(projections, batch, state)

    # One program with two branches: steps without a probe do not pay for it.
    return jax.lax.cond(
        probe.due(state),
        learn,
        lambda params, batch, state: state,
        *(params, batch, state),
    )


def _projections(
    objective: Objective,
    score: Score,
    params,
    batch: PreferenceBatch,
    state: State,
    key: Array,
) -> Array:
    """<g_i, v> of every pair's gradient g_i, [A, R, S], on every device.

    v is a direction of random signs.
    """

    def pair_losses(params):
        def of_micro(micro):
            inputs = Inputs(score(params, micro), micro)
            return weighted_losses(objective, inputs, state)

        return jax.lax.map(of_micro, batch)

    direction = sketches.direction(key, params)
    # Computes J v as the gradient of u -> J^T u: matrix products have custom gradient
    # rules, which jax.jvp cannot differentiate.
    values, pullback = jax.vjp(pair_losses, params)
    _, pushforward = jax.vjp(lambda u: pullback(u)[0], jnp.zeros_like(values))
    return replicated(pushforward(direction)[0])
