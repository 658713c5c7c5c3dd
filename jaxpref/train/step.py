"""The train step: gradient -> optax -> apply, and a guard against non-finite values."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxpref.objectives.objective import Objective
from jaxpref.scoring.scores import ScoreFunction
from jaxpref.train.state import TrainState


def make_train_step(
    scores: ScoreFunction,
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable:
    """Returns the jitted, donated `step(state, batch, reference) -> (state, metrics)`.

    `reference` is the reference's parameters, or None where the objective needs none.

    A loss, gradient or update that is not finite never enters the state: parameters,
    optimiser and objective keep their old values, `skipped` counts one more, and the
    metric `finite` is False, for `Guard` to report the pairs.
    """

    def train_step(state: TrainState, batch, reference=None):
        grads, objective_state, metrics = objective.gradient(
            functools.partial(scores, reference=reference),
            state.params,
            batch,
            state.objective_state,
        )
        norm = optax.tree.norm(grads)
        updates, _ = tx.update(grads, state.opt_state, state.params)
        finite = (
            jnp.isfinite(metrics["loss"])
            & jnp.isfinite(norm)
            & jnp.isfinite(optax.tree.norm(updates))
        )

        def stepped():
            # Made a second time, in the loop that writes the state in place: a second
            # look at the arrays is cheaper than to keep old and new ones side by side.
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return dataclasses.replace(
                state,
                params=optax.apply_updates(state.params, updates),
                opt_state=opt_state,
                objective_state=objective_state,
            )

        kept = jax.lax.cond(finite, stepped, lambda: state)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.skipped),
            "tokens": jnp.sum(batch.lengths),
            "fill": jnp.mean(batch.lengths / batch.tokens.shape[-1]),
            "pairs": jnp.sum(batch.pairs >= 0),
            "finite": finite,
        }
        return dataclasses.replace(
            kept, step=state.step + 1, skipped=state.skipped + ~finite
        ), metrics

    return jax.jit(train_step, donate_argnums=0)
