"""BVPO: an objective of pairs with traces and of pairs with an empty trace, mixed.

It wraps any objective of single pairs.  The mathematics is `jaxpref.gradients.bvpo`;
here it meets a batch that holds both kinds of pairs.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.gradients import bvpo as mixing
from jaxpref.objectives.objective import Objective
from jaxpref.sharding import replicated

AUTO = "auto"


def bvpo(
    objective: Objective,
    *,
    alpha: float | Literal["auto"] = 0.5,
    probe_every: int = 16,
    decay: float = 0.9,
) -> Objective:
    """BVPO: mix the gradients of pairs with traces and of pairs with an empty trace.

        gradient = alpha mean_t + (1 - alpha) mean_e

    of the gradients of the batch's n_t pairs with a trace and n_e with an empty one.
    Pairs are weighted by alpha n / n_t and (1 - alpha) n / n_e, n = n_t + n_e, so it is
    one backward pass, and `loss` is mixed likewise.  A batch of one kind has that
    kind's plain mean, whatever alpha is.  What `objective` learns of the labels, it
    learns of all pairs alike: a record that is there with its traces and with an empty
    one votes for each.  Evaluation is its own.

    "auto" is the alpha of least mean squared error about the gradient of pairs with
    traces, estimated while training.  A probe takes the derivative of all n losses
    along one random direction v by two pull-backs: the numbers <g_i, v> are sketches of
    size 1 of the pairs' gradients, of which `jaxpref.gradients.bvpo.ingredients` makes
    bias and variances.  Pairs are the draws: the variances include that of the data
    beside that of the traces, and so does what stochastic gradient descent suffers.
    Every one of the first `probe_every` steps is probed and then each `probe_every`-th.
    The alpha of a step comes from the probes before it, never from its own pairs, and
    is 0.5 at the first.

    A probe costs about one more step, a random sign for every parameter, and memory for
    one more copy of them: with probes at one step in 16, 6.3 % of the time (quartiles
    -0.9 to 7.1) with sizes of 260,000 parameters and 2,048 tokens a step; with two
    layers of a 135M model and 1,024 tokens a probe is 1.2 steps, 7.5 % (`python -m
    benchmarks.bvpo_overhead` with the options that stand there; two quiet cores).

    Metrics: `bvpo/alpha`; of "auto" as well, averaged over probes, in units of the
    batch's gradient before clipping: `trace_grad_norm` and `empty_grad_norm` (root mean
    squares of the norms of mean_t and mean_e) and their `cosine`; `trace_variance`,
    `empty_variance` and `bias_sq` (of mean_t, of mean_e, and of mean_e about mean_t;
    the last is unbiased and may be below 0); `mse` at alpha, `mse_trace` and
    `mse_empty` at 1 and 0.

    Args:
      objective: of single pairs, as `from_loss(losses.dpo)` or `em(losses.dpo)`.
      alpha: the share of pairs with traces, in [0, 1], or "auto".
      probe_every: optimiser steps between two probes of "auto", >= 1.
      decay: what stays of the averages of "auto" at a probe, in [0, 1); they span about
        1 / (1 - decay) probes.

    Raises:
      InputError: if an option is out of its range, or the objective couples the pairs
        of a batch or does not read pairs: then a pair has no gradient of its own.

    References:
      Zhu et al., "BVPO", 2025, arXiv:2510.05095, Eq. 2, with alpha = 0.5; "auto" is the
      optimum of theorem 2 there, estimated in a way that is ours.
    """
    auto = alpha == AUTO
    if not auto and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise InputError(f"bvpo: alpha {alpha}: must be in [0, 1], or auto")
    if probe_every < 1:
        raise InputError(f"bvpo: probe_every {probe_every}: must be at least 1")
    if not 0 <= decay < 1:
        raise InputError(f"bvpo: decay {decay}: must be in [0, 1)")
    if objective.coupled:
        raise InputError(
            f"bvpo: {objective.name} couples the pairs of a batch, which then have no "
            "gradients of their own to mix; use a loss of single pairs"
        )
    if objective.sides != 2:
        raise InputError(f"bvpo: {objective.name} reads no pairs; use a loss of pairs")
    average = mixing.running(decay=decay)

    def init(num_annotators):
        state = {"base": objective.init(num_annotators)}
        if auto:
            zero = lambda: jnp.zeros((), jnp.float32)
            state |= {
                "running": average.init(),
                "products": {name: zero() for name in ("trace", "empty", "both")},
                "steps": jnp.zeros((), jnp.int32),
            }
        return state

    def slopes(scores, params, batch, state):
        """<g_i, v> of every pair, [A, R, S], on every device."""
        key = jax.random.fold_in(jax.random.key(0), state["steps"])

        def losses(params):
            one = lambda micro: objective.losses(
                scores(params, micro), micro, state["base"]
            )
            return jax.lax.map(one, batch)

        along = mixing.direction(key, params)
        # J v as the slope of u -> J^T u: the products' gradients are rules of their
        # own, through which jax.jvp cannot go.
        values, pull = jax.vjp(losses, params)
        _, push = jax.vjp(lambda u: pull(u)[0], jnp.zeros_like(values))
        return replicated(push(along)[0])

    def probe(scores, params, batch, state):
        draws = slopes(scores, params, batch, state).ravel()
        trace, empty = (replicated(where).ravel() for where in kinds(batch))
        n_t, n_e = jnp.sum(trace), jnp.sum(empty)
        found = mixing.ingredients(
            draws,
            draws,
            trace_where=trace,
            empty_where=empty,
            trace_size=n_t,
            empty_size=n_e,
        )
        _, running = average.update(found, state["running"])
        mean_t = jnp.sum(jnp.where(trace, draws, 0)) / n_t
        mean_e = jnp.sum(jnp.where(empty, draws, 0)) / n_e
        new = {"trace": mean_t**2, "empty": mean_e**2, "both": mean_t * mean_e}
        # As `running` does, which passes over what is not known; bias not corrected.
        known = jnp.all(jnp.isfinite(jnp.stack(list(vars(found).values()))))
        toward = lambda old, new: jnp.where(
            known, decay * old + (1 - decay) * new, old
        ).astype(old.dtype)
        products = jax.tree.map(toward, state["products"], new)
        return running, products

    def learn(scores, params, batch, state):
        """The state after the step, but for what `objective` learns."""
        steps = state["steps"]
        due = (steps < probe_every) | (steps % probe_every == 0)
        # Traced as branches of one program: steps without a probe do not pay for it.
        running, products = jax.lax.cond(
            due,
            functools.partial(probe, scores),
            lambda params, batch, state: (state["running"], state["products"]),
            *(params, batch, state),
        )
        return {"running": running, "products": products, "steps": steps + 1}

    def gradient(scores, params, batch, state):
        share = alpha
        if auto:
            before = state["running"]
            best = mixing.optimal_alpha(**vars(before.means))
            share = jnp.where(before.weight > 0, best, 0.5)
        mixed, share = weighted(batch, share)
        grads, base, metrics = objective.gradient(scores, params, mixed, state["base"])
        following, shown = {"base": base}, {"bvpo/alpha": share}
        if auto:
            following |= learn(scores, params, batch, state)
            shown |= show(share, following["running"], following["products"])
        return grads, following, metrics | shown

    own = {"alpha": alpha}
    if auto:
        own |= {"probe_every": probe_every, "decay": decay}
    return dataclasses.replace(
        objective,
        name=f"bvpo_{objective.name}",
        # Not beside the loss's own, of which one may be called alpha.
        options=dict(objective.options) | {"bvpo": own},
        init=init,
        gradient=gradient,
        losses=lambda scores, batch, state: objective.losses(
            scores, batch, state["base"]
        ),
        metrics=lambda scores, batch, state: objective.metrics(
            scores, batch, state["base"]
        ),
        mixes=True,
    )


def kinds(batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """Which slots hold a pair with a trace, and which one with an empty trace."""
    real = batch.pairs >= 0
    return real & ~batch.empty, real & batch.empty


def weighted(batch: PreferenceBatch, alpha) -> tuple[PreferenceBatch, jax.Array]:
    """The batch whose mean loss is the mixture, and alpha; 1 or 0 if of one kind."""
    n_t, n_e = (jnp.sum(where) for where in kinds(batch))
    dtype = batch.weights.dtype
    alpha = jnp.where(n_e == 0, 1, jnp.where(n_t == 0, 0, alpha)).astype(dtype)
    factor = lambda share, n: share * (n_t + n_e) / jnp.maximum(n, 1)
    trace, empty = factor(alpha, n_t), factor(1 - alpha, n_e)
    weights = batch.weights * jnp.where(batch.empty, empty, trace).astype(dtype)
    return dataclasses.replace(batch, weights=weights), alpha


def show(alpha, running: mixing.RunningState, products) -> dict[str, jax.Array]:
    """Metrics of what was learnt."""
    means = vars(running.means)
    error = functools.partial(mixing.mean_squared_error, **means)
    # Averages begun at 0, as `running` would have them.
    square = {k: x / jnp.maximum(running.weight, 1e-30) for k, x in products.items()}
    lengths = jnp.sqrt(square["trace"]) * jnp.sqrt(square["empty"])
    return {
        "bvpo/trace_grad_norm": jnp.sqrt(square["trace"]),
        "bvpo/empty_grad_norm": jnp.sqrt(square["empty"]),
        "bvpo/cosine": square["both"] / jnp.maximum(lengths, 1e-30),
        "bvpo/trace_variance": means["trace_variance"],
        "bvpo/empty_variance": means["empty_variance"],
        "bvpo/bias_sq": means["empty_bias_sq"],
        "bvpo/mse": error(alpha),
        "bvpo/mse_trace": error(1.0),
        "bvpo/mse_empty": error(0.0),
    }
