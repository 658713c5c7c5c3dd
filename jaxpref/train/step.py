"""The train step: gradient, update, and a check that all values are finite."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxpref.data.batch import PreferenceBatch
from jaxpref.objectives.objective import Objective
from jaxpref.scoring.moving_reference import MovingReference
from jaxpref.scoring.partition import in_training
from jaxpref.scoring.scorer import Scorer
from jaxpref.train.gradient import gradient
from jaxpref.train.state import TrainState


def make_train_step(
    scorer: Scorer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    moving: MovingReference | None = None,
) -> Callable:
    """Returns the jitted `step(state, frozen, batch) -> (state, metrics)`.

    `state` is donated.  A non-finite loss, gradient or update never enters the state:
    parameters, optimizer and objective keep their old values, `skipped` increases by
    one, and the metric `finite` is False, so that `Guard` reports the pairs.
    """

    def train_step(state: TrainState, frozen, batch):
        read, totals = in_training(frozen, state.step), objective.totals
        score = lambda params, micro: scorer(params, read, micro, totals=totals)
        if moving is not None:
            batch = moving.scored(state.reference, frozen, batch)
        grads, objective_state, metrics = gradient(
            objective, score, state.params, batch, state.objective_state
        )
        norm = optax.tree.norm(grads)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        finite = (
            jnp.isfinite(metrics["loss"])
            & jnp.isfinite(norm)
            & jnp.isfinite(optax.tree.norm(updates))
        )

        def updated():
            # Computed again inside the branch, where XLA writes the new state in place:
            # reading the arrays twice is cheaper than holding both states in memory.
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params, reference = optax.apply_updates(state.params, updates), None
            if moving is not None:
                reference = moving.moved(state.reference, params, state.step + 1)
            return dataclasses.replace(
                state,
                params=params,
                opt_state=opt_state,
                objective_state=objective_state,
                reference=reference,
            )

        following = jax.lax.cond(finite, updated, lambda: state)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.skipped),
            "tokens": jnp.sum(batch.lengths),
            "token_utilization": _utilization(batch),
            "pairs": jnp.sum(batch.pair_index >= 0),
            "finite": finite,
        }
        return dataclasses.replace(
            following, step=state.step + 1, skipped=state.skipped + ~finite
        ), metrics

    return jax.jit(train_step, donate_argnums=0)


def _utilization(batch: PreferenceBatch) -> jax.Array:
    """Share of computed tokens that are real; empty micro-batches are not computed."""
    filled = jnp.sum(jnp.any(batch.pair_index >= 0, axis=(1, 2)))
    computed = filled * math.prod(batch.tokens.shape[1:])
    return jnp.sum(batch.lengths) / jnp.maximum(computed, 1)
