"""Gradients of single pairs along a random direction, for an objective's probe."""

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
    Objective,
    State,
    weighted_losses,
)
from jaxpref.scoring.scores import Scored
from jaxpref.sharding import replicated

Score = Callable[[Any, PreferenceBatch], Scored]
"""`(params, micro-batch) -> Scored`: a scorer with `frozen` and `totals` bound."""


def probed(
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
            inputs = Inputs(score(params, micro).scores, micro)
            return weighted_losses(objective, inputs, state)

        return jax.lax.map(of_micro, batch)

    direction = sketches.direction(key, params)
    # Computes J v as the gradient of u -> J^T u: matrix products have custom gradient
    # rules, which jax.jvp cannot differentiate.
    values, pullback = jax.vjp(pair_losses, params)
    _, pushforward = jax.vjp(lambda u: pullback(u)[0], jnp.zeros_like(values))
    return replicated(pushforward(direction)[0])
