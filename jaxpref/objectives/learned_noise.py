"""Objectives that learn how noisy the labels are while they train a policy.

Each wraps any loss of single pairs.  What it learns is the objective's state: one
reliability an annotator, or one flip rate, checkpointed with the model.
"""

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.noise import em as noise
from jaxpref.noise import running
from jaxpref.noise.rate import marginal_nll
from jaxpref.objectives.objective import Objective, mean_of

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


def learned_rate(loss: Loss, *, memory: float = 20_000.0, **options) -> Objective:
    """One flip rate, learnt with the policy by the likelihood of the labels.

        loss  = -log((1 - e) p + e (1 - p)),    p = s(loss(exchanged) - loss(pair))
        e     = the most likely flip rate given the margins of past batches

    `em` weighs each label by the posterior of a policy that at first knows nothing, and
    so stays near its prior.  Here e is judged by how often the policy's surer margins
    agree with labels it had not yet seen, and the margins' temperature is judged beside
    it: `jaxpref.noise.running`.  In later passes over the data labels have been seen,
    and e comes out too small.

    Args:
      loss: a loss of single pairs.
      memory: labels after which an old one counts 1/e: the policy's margins change.
      **options: hyper-parameters of `loss`.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      The marginal likelihood is RE-PO's, Cao et al., 2025, arXiv:2509.24159, Eq. 11;
      the posterior of rate and temperature, in place of EM, is ours.
    """
    if not memory > 0:
        raise InputError(f"learned_rate: memory {memory}: must be above 0")
    logits = logits_of(loss)

    def trained(*arrays, **options):
        *pair, running_rate = arrays
        return marginal_nll(logits(*pair, **options), running_rate)

    declare(trained, logits, ["running_rate"], f"learned_rate_{loss.__name__}")

    def init(_):
        counts = running.no_counts()
        return {"running_rate": running.posterior(counts).rate, "counts": counts}

    def learn(arrays, batch, state):
        *pair, _ = arrays.values()
        margins = logits(*pair, **options)
        real = batch.pairs >= 0
        counts = running.count(state["counts"], margins, memory=memory, where=real)
        return {"running_rate": running.posterior(counts).rate, "counts": counts}

    def show(arrays, batch, state):
        found = running.posterior(state["counts"])
        return {
            "noise/flip_rate": found.rate,
            "noise/flip_rate_lower": found.lower,
            "noise/flip_rate_upper": found.upper,
            # Whether to quote the rate, or only the interval.
            "noise/identified": found.identified.astype(jnp.float32),
            "noise/temperature": found.temperature,
        }

    own = {"memory": memory}
    return mean_of(trained, options, own=own, init=init, learn=learn, show=show)


def _em(loss, options, reading, own, init, step) -> Objective:
    """EM whose policy is trained by `reading(loss, its logits)`.

    That loss has the reliabilities as its last array.
    `step(state, weights, batch) -> state` is the M-step of the reliabilities.
    """
    logits = logits_of(loss)
    trained = reading(loss, logits)

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

    return mean_of(trained, options, own=own, init=init, learn=learn, show=show)


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


def _likelihood(loss: Loss, logits: Loss) -> Loss:
    def trained(z, arrays, options, right):
        return noise.likelihood_loss(z, right)

    return _of_posterior(logits, trained, f"em_{loss.__name__}")


def _weighted(loss: Loss, logits: Loss) -> Loss:
    reads = inspect.signature(loss).parameters

    def trained(z, arrays, options, right):
        own = {name: array for name, array in arrays.items() if name in reads}
        pair = loss(**own, **options)
        return noise.weighted_loss(pair, pair + z, right)

    return _of_posterior(logits, trained, f"em_weighted_{loss.__name__}")


def _of_posterior(logits: Loss, trained: Callable, name: str) -> Loss:
    """A loss called `name` of the arrays of `logits` and of `reliabilities`.

    `trained(margin logits, arrays, options, posterior that the label is right)`.
    """
    parameters = list(inspect.signature(logits).parameters.values())
    names = [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]

    def declared(*given, **options):
        *pair, reliabilities = given
        z = logits(*pair, **options)
        right = noise.posterior(z, reliabilities)
        return trained(z, dict(zip(names, pair)), options, right)

    declare(declared, logits, ["reliabilities"], name)
    return declared


def logits_of(loss: Loss) -> Loss:
    """Its Gibbs logits: loss(exchanged) - loss(pair).

    Raises:
      InputError: if the loss is not one of single pairs.
    """
    try:
        return losses.gibbs_logits(loss)
    except TypeError as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error


def declare(
    function: Callable,
    like: Loss,
    more: Sequence[str],
    name: str,
    *,
    coupled: bool = False,
) -> None:
    """Gives `function` the arrays and options of `like`, and some arrays more.

    `coupled` says that it takes `where`: it reads all pairs of a batch at once.
    """
    parameters = inspect.signature(like).parameters.values()
    arrays = [p for p in parameters if p.kind != p.KEYWORD_ONLY]
    options = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    arrays += [arrays[0].replace(name=extra) for extra in more]
    if coupled:
        keyword = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter("where", keyword, default=None))
    function.__name__ = name
    function.__signature__ = inspect.Signature([*arrays, *options])
