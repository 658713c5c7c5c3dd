"""Collaborative reward modelling: two models that choose each other's pairs.

The run's parameters are {"one": ..., "two": ...}; its scores hold those of the second
model under names that begin with `peer_`.  The mathematics is `jaxpref.noise.peer`.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpref.errors import InputError
from jaxpref.noise.peer import kept_share, peer_selection
from jaxpref.objectives.learned_noise import declare, logits_of
from jaxpref.objectives.objective import Objective, mean_of
from jaxpref.scoring.scores import OF_THE_MODEL, ScoreFunction, Scores, without_side


def crm(
    loss: Callable[..., jax.Array],
    *,
    noise_rate: float,
    ramp_steps: float = 100.0,
    **options,
) -> Objective:
    """CRM: two reward models, or policies (CRM-DPO), that select each other's pairs.

        keep   = 1 - noise_rate min(1, step / ramp_steps)
        easy_m = loss(exchanged) - loss(pair) under model m, the batch's round(keep n)
                 largest
        loss   = mean of loss under one over easy_two + the same the other way round

    Two policies start from the same weights, and two equal models would stay equal: so
    up to `ramp_steps` each pair teaches only one of the two, by its place in the batch.
    Select in large batches.  Evaluation is that of model one on all pairs; gradients of
    both models share `max_grad_norm`.

    Args:
      loss: a loss of single pairs.
      noise_rate: the share of labels that is wrong, in [0, 1): known, or estimated, as
        by `jaxpref audit` or `em`.
      ramp_steps: optimiser steps until so many pairs are dropped, > 0; the published
        schedule is three epochs.
      **options: hyper-parameters of `loss`.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Zhang et al., CRM, 2025, arXiv:2505.10597, peer review within the batch; schedule
      of Han et al., Co-teaching, 2018, arXiv:1804.06872.  How two policies are kept
      apart is not described there, and ours.
    """
    if not 0 <= noise_rate < 1:
        raise InputError(f"crm: noise_rate {noise_rate}: must be in [0, 1)")
    if not 0 < ramp_steps < float("inf"):
        raise InputError(f"crm: ramp_steps {ramp_steps}: must be above 0 and finite")
    logits = logits_of(loss)
    names = [
        p.name
        for p in inspect.signature(logits).parameters.values()
        if p.kind != p.KEYWORD_ONLY
    ]
    own_names = [name for name in names if without_side(name) in OF_THE_MODEL]
    read_by_loss = inspect.signature(loss).parameters

    def of_both(arrays):
        """The arrays of model one and of model two, by the loss's names."""
        one = {name: arrays[name] for name in names}
        return one, one | {name: arrays[f"peer_{name}"] for name in own_names}

    def trained(*given, where=None, **options):
        arrays = dict(zip([*names, *(f"peer_{n}" for n in own_names)], given))
        steps = given[-1]
        both = of_both(arrays)
        margins = [jax.lax.stop_gradient(logits(**a, **options)) for a in both]
        where = jnp.ones_like(margins[0], bool) if where is None else where
        keep = kept_share(steps, noise_rate=noise_rate, ramp_epochs=ramp_steps)
        place = jnp.arange(where.size).reshape(where.shape)
        total = 0.0
        for parity, (model, selected) in enumerate(
            zip(both, peer_selection(*margins, keep=keep, where=where))
        ):
            taught = (place + steps.astype(jnp.int32)) % 2 == parity
            selected &= taught | (steps >= ramp_steps)
            values = loss(
                **{n: x for n, x in model.items() if n in read_by_loss}, **options
            )
            # The mean over its own pairs, whatever the sum is divided by.
            share = jnp.sum(where) / jnp.maximum(jnp.sum(selected), 1)
            total += jnp.where(selected, values * share, 0)
        return total

    more = [*(f"peer_{name}" for name in own_names), "running_steps"]
    declare(trained, logits, more, f"crm_{loss.__name__}", coupled=True)

    def init(_):
        return {"running_steps": jnp.zeros((), jnp.int32)}

    def learn(arrays, batch, state):
        return {"running_steps": state["running_steps"] + 1}

    def show(arrays, batch, state):
        real = batch.pairs >= 0
        margins = [logits(**a, **options) for a in of_both(arrays)]
        keep = kept_share(
            state["running_steps"], noise_rate=noise_rate, ramp_epochs=ramp_steps
        )
        selected = jnp.stack(peer_selection(*margins, keep=keep, where=real))
        mean = lambda x, where: (
            jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)
        )
        wins = lambda z: jnp.where(z == 0, 0.5, (z > 0).astype(z.dtype))
        return {
            "crm/kept": keep,
            "crm/accuracies_two": mean(wins(margins[1]), real),
            "crm/agreement": mean((margins[0] > 0) == (margins[1] > 0), real),
            # Known only of flips that were planted.
            "crm/kept_flipped": mean(batch.flips, selected),
        }

    own = {"noise_rate": noise_rate, "ramp_steps": ramp_steps}
    objective = mean_of(trained, options, own=own, init=init, learn=learn, show=show)
    # Evaluation is that of the first model, on all pairs.
    alone = mean_of(loss, options)
    return dataclasses.replace(
        objective, losses=lambda scores, batch, state: alone.losses(scores, batch, {})
    )


def both(make: Callable) -> Callable:
    """`make(key)` of one model -> the parameters of two, from different keys."""
    return lambda key: {"one": make(key), "two": make(jax.random.fold_in(key, 1))}


def scores_of_both(scores: ScoreFunction) -> ScoreFunction:
    """Scores of a model -> scores of two, those of the second as `peer_...`."""

    def of_both(params, batch, reference=None) -> Scores:
        two = scores(params["two"], batch, reference)
        peers = {f"peer_{name}": array for name, array in two.items()}
        return scores(params["one"], batch, reference) | peers

    return of_both
