"""Objectives that learn how noisy the labels are while they train a policy.

Each wraps any loss of single pairs.  What it learns is the objective's state: one
reliability an annotator, or one flip rate, checkpointed with the model.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.noise import em as noise
from jaxpref.noise import rate as flip_rate
from jaxpref.train.objective import Objective, mean_of

Loss = Callable[..., jax.Array]


def em(
    loss: Loss,
    *,
    prior_right: float = 9.0,
    prior_wrong: float = 1.0,
    memory: float = 20_000.0,
    **options,
) -> Objective:
    """Online EM: reliabilities from soft counts, the policy by the Gibbs likelihood.

        w     = P(label right | margin, reliability of its annotator)
        loss  = -w log p - (1 - w) log(1 - p),    p = s(loss(exchanged) - loss(pair))
        eta_k = (prior_right + sum of w) / (prior_right + prior_wrong + votes of k)

    Pairs without an annotator share one.  An annotator with few votes stays near the
    prior, one with many leaves it behind.

    Args:
      loss: a loss of single pairs.
      prior_right: votes of every annotator that count as right beforehand, >= 0.
      prior_wrong: votes of every annotator that count as wrong beforehand, >= 0.
      memory: votes after which an old vote of the same annotator counts 1/e: what the
        policy said of it early in training is soon out of date.
      **options: hyper-parameters of `loss`.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Cao et al., RE-PO, 2025, arXiv:2509.24159, Eq. 3 to 6; counts and prior are ours.
    """
    own = _counting(prior_right, prior_wrong, memory)
    return _em(loss, options, _likelihood, own, *_counts(**own))


def em_weighted(
    loss: Loss,
    *,
    prior_right: float = 9.0,
    prior_wrong: float = 1.0,
    memory: float = 20_000.0,
    **options,
) -> Objective:
    """As `em`, but the policy is trained by the original loss, weighted.

        loss  = w loss(pair) + (1 - w) loss(exchanged)

    The other reading of the paper's M-step: what a loss has beside its preference term
    (CPO's likelihood, IPO's square) is kept.  For DPO both are one.

    Args:
      loss: a loss of single pairs.
      prior_right: votes of every annotator that count as right beforehand, >= 0.
      prior_wrong: votes of every annotator that count as wrong beforehand, >= 0.
      memory: votes after which an old vote of the same annotator counts 1/e.
      **options: hyper-parameters of `loss`.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.
    """
    own = _counting(prior_right, prior_wrong, memory)
    return _em(loss, options, _weighted, own, *_counts(**own))


def re_po(
    loss: Loss, *, reliability: float = 0.9, momentum: float = 0.9, **options
) -> Objective:
    """RE-PO as published: reliabilities are moving averages over batches.

        eta_k <- momentum eta_k + (1 - momentum) mean of w over the batch's votes of k

    Args:
      loss: a loss of single pairs.
      reliability: every annotator's at the start, in (0, 1).
      momentum: the part of the old value that stays, in [0, 1); the paper's 1 - alpha.
      **options: hyper-parameters of `loss`.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Cao et al., RE-PO, 2025, arXiv:2509.24159, Algorithm 1 and Eq. 5 and 7.
    """
    if not 0 < reliability < 1:
        raise InputError(f"re_po: reliability {reliability}: must be between 0 and 1")
    if not 0 <= momentum < 1:
        raise InputError(f"re_po: momentum {momentum}: must be in [0, 1)")

    def init(num_annotators):
        return {"reliability": jnp.full(num_annotators + 1, reliability, jnp.float32)}

    def step(state, weights, batch):
        moved = noise.update(
            state["reliability"],
            weights,
            batch.annotators,
            momentum=momentum,
            where=batch.pairs >= 0,
        )
        return {"reliability": moved}

    own = {"reliability": reliability, "momentum": momentum}
    return _em(loss, options, _likelihood, own, init, step)


def learned_rate(
    loss: Loss,
    *,
    rate: float = 0.25,
    learning_rate: float = 0.02,
    warm_up: float = 0.0,
    annealing: float = float("inf"),
    **options,
) -> Objective:
    """One flip rate, learnt with the policy by the likelihood of the labels.

        loss  = -log((1 - e) p + e (1 - p)),    p = s(loss(exchanged) - loss(pair))

    e in (0, 1/2) climbs the same likelihood, by a step of Fisher scoring a batch, cut
    by `learning_rate`.  Unlike `em` it does not weigh by posteriors of a policy that
    knows nothing yet, so it does not stick to its start where labels are very noisy.
    Let it be slow: where e runs ahead of the policy, margins run away with it.

    Args:
      loss: a loss of single pairs.
      rate: e at the start, in (0, 1/2).
      learning_rate: size of e's steps; 1 is undamped Fisher scoring on each batch.
      warm_up: steps before e moves.
      annealing: steps after the warm-up until e's steps are half as large.
      **options: hyper-parameters of `loss`.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      The marginal likelihood is RE-PO's, Cao et al., 2025, arXiv:2509.24159, Eq. 11;
      climbing it in the rate itself, in place of EM, is ours.
    """
    own = {"rate": rate, "learning_rate": learning_rate, "warm_up": warm_up}
    own["annealing"] = annealing
    if not 0 < rate < 0.5:
        raise InputError(f"learned_rate: rate {rate}: must be between 0 and 1/2")
    if not learning_rate >= 0 or not warm_up >= 0 or not annealing > 0:
        raise InputError(f"learned_rate: a step size is out of range: {own}")
    logits = _logits(loss)

    def trained(*arrays, **options):
        *pair, running_rate = arrays
        return flip_rate.marginal_nll(logits(*pair, **options), running_rate)

    _declare(trained, logits, "running_rate", f"learned_rate_{loss.__name__}")

    def init(_):
        logit = flip_rate.logit_of(jnp.float32(rate))
        steps = jnp.zeros((), jnp.int32)
        return {"running_rate": jnp.float32(rate) + 0, "logit": logit, "steps": steps}

    def learn(arrays, batch, state):
        *pair, _ = arrays.values()
        logit = flip_rate.update(
            state["logit"],
            logits(*pair, **options),
            step=state["steps"],
            learning_rate=learning_rate,
            warm_up=warm_up,
            annealing=annealing,
            where=batch.pairs >= 0,
        )
        rate = flip_rate.rate_of(logit)
        return {"running_rate": rate, "logit": logit, "steps": state["steps"] + 1}

    def show(arrays, batch, state):
        return {"noise/flip_rate": state["running_rate"]}

    objective = mean_of(trained, options, init=init, learn=learn, show=show)
    return _with_options(objective, own)


def _em(loss, options, reading, own, init, step) -> Objective:
    """EM whose policy is trained by `reading(loss)`, whose last array is reliability.

    `step(state, weights, batch) -> state` is the M-step of the reliabilities.
    """
    logits = _logits(loss)
    trained = reading(loss)

    def posteriors(arrays):
        *pair, reliabilities = arrays.values()
        return noise.posterior(logits(*pair, **options), reliabilities)

    def learn(arrays, batch, state):
        return step(state, posteriors(arrays), batch)

    def show(arrays, batch, state):
        real = batch.pairs >= 0
        right = posteriors(arrays)
        mean = lambda x, where: (
            jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)
        )
        return {
            "noise/flip_rate": mean(1 - arrays["reliabilities"], real),
            "noise/posterior": mean(right, real),
            # Known only of flips that were planted.
            "noise/posterior_flipped": mean(right, real & batch.flips),
        }

    objective = mean_of(trained, options, init=init, learn=learn, show=show)
    return _with_options(objective, own)


def _counts(prior_right: float, prior_wrong: float, memory: float):
    """(init, step) of reliabilities that are shares of counted votes."""
    prior = prior_right, prior_wrong

    def init(num_annotators):
        zeros = jnp.zeros(num_annotators + 1, jnp.float32)
        start = noise.estimate(zeros, zeros, prior=prior)
        return {"reliability": start, "right": zeros, "wrong": jnp.zeros_like(zeros)}

    def step(state, weights, batch):
        right, wrong = noise.tally(
            state["right"],
            state["wrong"],
            weights,
            batch.annotators,
            memory=memory,
            where=batch.pairs >= 0,
        )
        reliability = noise.estimate(right, wrong, prior=prior)
        return {"reliability": reliability, "right": right, "wrong": wrong}

    return init, step


def _counting(prior_right: float, prior_wrong: float, memory: float) -> dict:
    for name, value in (("prior_right", prior_right), ("prior_wrong", prior_wrong)):
        if not 0 < value < float("inf"):
            raise InputError(f"em: {name} {value}: must be above 0 and finite")
    if not memory > 0:
        raise InputError(f"em: memory {memory}: must be above 0")
    return {"prior_right": prior_right, "prior_wrong": prior_wrong, "memory": memory}


def _likelihood(loss: Loss) -> Loss:
    def trained(z, arrays, options, right):
        return noise.likelihood_loss(z, right)

    return _of_posterior(loss, trained, "em")


def _weighted(loss: Loss) -> Loss:
    reads = inspect.signature(loss).parameters

    def trained(z, arrays, options, right):
        own = {name: array for name, array in arrays.items() if name in reads}
        pair = loss(**own, **options)
        return noise.weighted_loss(pair, pair + z, right)

    return _of_posterior(loss, trained, "em_weighted")


def _of_posterior(loss: Loss, trained: Callable, how: str) -> Loss:
    """A loss of the arrays of `loss` and of `reliabilities`.

    `trained(margin logits, arrays, options, posterior that the label is right)`.
    """
    logits = losses.gibbs_logits(loss)
    parameters = list(inspect.signature(logits).parameters.values())
    names = [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]

    def declared(*given, **options):
        *pair, reliabilities = given
        z = logits(*pair, **options)
        right = noise.posterior(z, reliabilities)
        return trained(z, dict(zip(names, pair)), options, right)

    _declare(declared, logits, "reliabilities", f"{how}_{loss.__name__}")
    return declared


def _logits(loss: Loss) -> Loss:
    try:
        return losses.gibbs_logits(loss)
    except TypeError as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error


def _declare(function: Callable, like: Loss, last: str, name: str) -> None:
    """Gives `function` the arrays and options of `like`, and one array more."""
    parameters = inspect.signature(like).parameters.values()
    arrays = [p for p in parameters if p.kind != p.KEYWORD_ONLY]
    options = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    arrays.append(arrays[0].replace(name=last))
    function.__name__ = name
    function.__signature__ = inspect.Signature([*arrays, *options])


def _with_options(objective: Objective, own: dict) -> Objective:
    return dataclasses.replace(objective, options=dict(objective.options) | own)
