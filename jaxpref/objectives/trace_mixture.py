"""BVPO: gradients of pairs with reasoning traces and of pairs with empty ones, mixed.

It wraps any objective of single pairs.  The mathematics is in `jaxpref.gradients.bvpo`.
This module weights the pairs of a batch that holds both kinds, and learns from probes
of their gradients.
"""

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.gradients import bvpo as mixing
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import GradientProbe, Metrics, Objective, State
from jaxpref.sharding import replicated

AUTO = "auto"


def bvpo(
    objective: Objective,
    *,
    alpha: float | Literal["auto"] = 0.5,
    probe_every: int = 16,
    decay: float = 0.9,
) -> Objective:
    """BVPO: mix the gradients of pairs with traces and with empty traces.

        gradient = alpha mean_t + (1 - alpha) mean_e

    where mean_t and mean_e are the mean gradients of the batch's n_t pairs with a trace
    and n_e pairs with an empty one.  Pairs are weighted by alpha n / n_t and
    (1 - alpha) n / n_e, n = n_t + n_e.  This takes one backward pass, and `loss` is
    mixed in the same way.  If a batch has pairs of one kind only, their plain mean is
    used, whatever alpha is.  `objective` learns from all pairs alike: a record that
    occurs with its traces and with an empty one votes once for each.  Evaluation is
    that of `objective`.

    With "auto", alpha is estimated during training.  It minimizes the mean squared
    error with respect to the expected gradient of pairs with traces.  A probe takes the
    derivative of all n losses along one random direction v, with two pullbacks.  The
    numbers <g_i, v> are sketches of size 1 of the pairs' gradients, from which
    `jaxpref.gradients.bvpo.ingredients` computes bias and variances.  Pairs are the
    draws, so the variances include that of the data as well as that of the traces, as
    in stochastic gradient descent.  The first `probe_every` steps are all probed, then
    every `probe_every`-th step.  The alpha of a step comes from earlier probes, never
    from the step's own pairs, and is initially 0.5.

    A probe costs about one more step, a random sign for every parameter, and memory for
    one more copy of the parameters.  With one probe in 16 steps, that is 6.3% of the
    time (quartiles -0.9 to 7.1) with 260,000 parameters and 2,048 tokens per step.
    With two layers of a 135M model and 1,024 tokens, a probe takes 1.2 steps, 7.5% of
    the time (`python -m benchmarks.bvpo_overhead` with the options given there; two
    quiet cores).

    Metrics: `bvpo/alpha`.  With "auto" there are more, averaged over probes, in units
    of the batch's gradient before clipping:
      `trace_grad_norm`, `empty_grad_norm`: root mean square norms of mean_t and mean_e;
      `cosine`: the cosine between them;
      `trace_variance`, `empty_variance`: the variances of mean_t and mean_e;
      `bias_sq`: the squared bias of mean_e relative to mean_t; it may be below 0;
      `mse`, `mse_trace`, `mse_empty`: the error at alpha, at 1 and at 0.

    Args:
      objective: an objective of single pairs, such as `from_loss(losses.dpo)` or
        `em(losses.dpo)`.
      alpha: the weight of pairs with traces, in [0, 1], or "auto".
      probe_every: optimizer steps between two probes of "auto", >= 1.
      decay: weight of the previous averages of "auto" at each probe, in [0, 1); they
        span about 1 / (1 - decay) probes.

    Raises:
      InputError: if an option is out of range, or if the objective couples the pairs of
        a batch or does not read pairs, so that a pair has no gradient of its own.

    References:
      Zhu et al., "BVPO", 2025, arXiv:2510.05095, Eq. 2, with alpha = 0.5.  "auto" is
      the optimum of their theorem 2; the way it is estimated is ours.
    """
    _check(objective, alpha, probe_every, decay)
    options: dict[str, Any] = {"alpha": alpha}
    if alpha == AUTO:
        options |= {"probe_every": probe_every, "decay": decay}
        mixture = _estimated(objective, probe_every, decay)
    else:
        mixture = _fixed(objective, alpha)
    # Nested, since the loss may have an option named alpha too.
    nested = {"objective": {"name": objective.name, **objective.options}}
    return dataclasses.replace(
        _of_base_state(objective),
        name=f"bvpo_{objective.name}",
        options=nested | options,
        reads=(*objective.reads, "empty_trace"),
        **mixture,
    )


def _check(
    objective: Objective, alpha: float | str, probe_every: int, decay: float
) -> None:
    if alpha != AUTO and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise InputError(f"bvpo: alpha {alpha}: must be in [0, 1], or auto")
    if probe_every < 1:
        raise InputError(f"bvpo: probe_every {probe_every}: must be at least 1")
    if not 0 <= decay < 1:
        raise InputError(f"bvpo: decay {decay}: must be in [0, 1)")
    if objective.couples:
        raise InputError(
            f"bvpo: {objective.name} couples the pairs of a batch, so that they have "
            "no gradients of their own to mix; use a pairwise loss"
        )
    if objective.kind.sides != 2:
        raise InputError(f"bvpo: {objective.name} reads no pairs; use a pairwise loss")


def _of_base_state(objective: Objective) -> Objective:
    """The same losses, of a state that holds the objective's own as "base"."""
    wrapped = dataclasses.replace(
        objective,
        losses=lambda inputs, state: objective.losses(inputs, state["base"]),
        evaluate=lambda inputs, state: objective.evaluation(inputs, state["base"]),
    )
    if (scalar := objective.scalar) is None:
        return wrapped
    return dataclasses.replace(
        wrapped, scalar=lambda inputs, state: scalar(inputs, state["base"])
    )


def _fixed(objective: Objective, alpha: float) -> dict:
    """The functions of a mixture with a fixed alpha."""

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        base, metrics = objective.learn(inputs, state["base"])
        shown = {"bvpo/alpha": effective_alpha(inputs.batch, alpha)}
        return {"base": base}, metrics | shown

    return {
        "init": lambda num_annotators: {"base": objective.init(num_annotators)},
        "weigh": lambda batch, state: mixture_weights(batch, alpha),
        "learn": learn,
    }


def _estimated(objective: Objective, probe_every: int, decay: float) -> dict:
    """The functions of a mixture whose alpha is estimated from probes."""
    average = mixing.running(decay=decay)

    def init(num_annotators: int) -> State:
        zero = lambda: jnp.zeros((), jnp.float32)
        return {
            "base": objective.init(num_annotators),
            "running": average.init(),
            "products": {name: zero() for name in ("trace", "empty", "both")},
            "alpha": jnp.full((), 0.5, jnp.float32),
            "steps": jnp.zeros((), jnp.int32),
        }

    def due(state: State) -> Array:
        steps = state["steps"]
        return (steps < probe_every) | (steps % probe_every == 0)

    def learn_from_probe(draws: Array, batch: PreferenceBatch, state: State) -> State:
        draws = draws.ravel()
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
        # Like `running`, ignores unknown values; `describe` corrects the bias.
        known = jnp.all(jnp.isfinite(jnp.stack(list(vars(found).values()))))
        toward = lambda old, new: jnp.where(
            known, decay * old + (1 - decay) * new, old
        ).astype(old.dtype)
        products = jax.tree.map(toward, state["products"], new)
        return state | {"running": running, "products": products}

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        base, metrics = objective.learn(inputs, state["base"])
        running, products = state["running"], state["products"]
        alpha = effective_alpha(inputs.batch, state["alpha"])
        metrics |= {"bvpo/alpha": alpha} | describe(alpha, running, products)
        best = mixing.optimal_alpha(**vars(running.means))
        following = {
            "base": base,
            "running": running,
            "products": products,
            "alpha": jnp.where(running.weight > 0, best, 0.5),
            "steps": state["steps"] + 1,
        }
        return following, metrics

    return {
        "init": init,
        "weigh": lambda batch, state: mixture_weights(batch, state["alpha"]),
        "learn": learn,
        "probe": GradientProbe(
            due=due,
            key=lambda state: jax.random.fold_in(jax.random.key(0), state["steps"]),
            learn=learn_from_probe,
        ),
    }


def kinds(
    batch: PreferenceBatch,
) -> tuple[Bool[Array, "*batch S"], Bool[Array, "*batch S"]]:
    """The slots that hold a pair with a trace, and those with an empty trace."""
    real = batch.pair_index >= 0
    found = real & ~batch.empty_trace, real & batch.empty_trace
    return cast(tuple[Array, Array], found)


def effective_alpha(
    batch: PreferenceBatch, alpha: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Alpha, or 1 or 0 if the batch holds pairs of one kind only."""
    n_t, n_e = (jnp.sum(where) for where in kinds(batch))
    dtype = batch.weights.dtype
    return jnp.where(n_e == 0, 1, jnp.where(n_t == 0, 0, alpha)).astype(dtype)


def mixture_weights(
    batch: PreferenceBatch, alpha: Float[Array, ""] | float
) -> Float[Array, "A R S"]:
    """Weights with which the mean loss is the mixture, [A, R, S]."""
    n_t, n_e = (jnp.sum(where) for where in kinds(batch))
    alpha = effective_alpha(batch, alpha)
    factor = lambda share, n: share * (n_t + n_e) / jnp.maximum(n, 1)
    trace, empty = factor(alpha, n_t), factor(1 - alpha, n_e)
    dtype = batch.weights.dtype
    weights = cast(Array, batch.weights)
    return weights * jnp.where(batch.empty_trace, empty, trace).astype(dtype)


def describe(
    alpha: Float[Array, ""], running: mixing.RunningState, products: State
) -> Metrics:
    """Metrics of the probes."""
    means = vars(running.means)
    error = functools.partial(mixing.mean_squared_error, **means)
    # The averages start at 0; corrects them as `running` corrects its own.
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
