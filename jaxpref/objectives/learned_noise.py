"""Objectives that learn how noisy the labels are during training.

Each wraps a pairwise loss.  What it learns is the objective's state: one
reliability or flip rate per annotator.  It is checkpointed with the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.noise import annotator_rates, running
from jaxpref.noise import em as noise
from jaxpref.noise.rate import marginal_nll
from jaxpref.objectives import first_pass
from jaxpref.objectives.bound_loss import BoundLoss, Loss, bind, check_of
from jaxpref.objectives.by_vote import of_each_pair, votes_on_pair
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Objective, State
from jaxpref.objectives.rewards import per_token_reward, reward_metrics

EStep = Callable[[Inputs, Array, Array], Array]
"""`(inputs, logits, posterior that the label is right) -> losses`."""
MStep = Callable[[State, Array, Inputs], State]
"""`(state, posteriors, inputs) -> state`."""


def em(
    loss: Loss,
    *,
    prior_right: float = 9.0,
    prior_wrong: float = 1.0,
    memory: float = 20_000.0,
) -> Objective:
    """Online EM: reliabilities from soft counts, and the Gibbs likelihood.

        w     = P(label right | margin, reliability of its annotator)
        loss  = -w log p - (1 - w) log(1 - p),    p = s(loss(swapped) - loss(pair))
        eta_k = (prior_right + sum of w) / (prior_right + prior_wrong + votes of k)

    Several votes on a pair share one latent truth: each label's w is its probability
    given all of them, and the pair's loss counts once.  Pairs without an annotator
    share one reliability.  With few votes, a reliability stays near the prior; with
    many, the prior has little effect.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      prior_right: prior votes of every annotator that count as right, > 0.
      prior_wrong: prior votes of every annotator that count as wrong, > 0.
      memory: votes of an annotator after which an old vote's weight is 1/e, since
        judgments of an early policy are soon out of date.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Cao et al., RE-PO, 2025, arXiv:2509.24159, Eq. 3 to 6; counts and prior are ours.
    """
    own = _count_options(prior_right, prior_wrong, memory)
    return _em("em", bind(loss), own, *_soft_counts(**own), _likelihood)


def em_weighted(
    loss: Loss,
    *,
    prior_right: float = 9.0,
    prior_wrong: float = 1.0,
    memory: float = 20_000.0,
) -> Objective:
    """As `em`, but the policy is trained with the original loss, weighted.

        loss  = w loss(pair) + (1 - w) loss(swapped)

    This is the other reading of the paper's M-step.  It preserves terms of the loss
    besides its preference term (CPO's likelihood, IPO's square).  For DPO, both
    readings are the same.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      prior_right: prior votes of every annotator that count as right, > 0.
      prior_wrong: prior votes of every annotator that count as wrong, > 0.
      memory: votes of an annotator after which an old vote's weight is 1/e.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.
    """
    own = _count_options(prior_right, prior_wrong, memory)
    bound = bind(loss)

    def weighted(inputs: Inputs, logits: Array, right: Array) -> Array:
        pair = bound(inputs)
        return noise.weighted_loss(pair, pair + logits, right)

    return _em("em_weighted", bound, own, *_soft_counts(**own), weighted)


def re_po(loss: Loss, *, reliability: float = 0.9, momentum: float = 0.9) -> Objective:
    """RE-PO as published: reliabilities are moving averages over batches.

        eta_k <- momentum eta_k + (1 - momentum) mean of w over the batch's votes of k

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      reliability: the initial reliability of every annotator, in (0, 1).
      momentum: weight of the previous value, in [0, 1); 1 - alpha in the paper.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Cao et al., RE-PO, 2025, arXiv:2509.24159, Algorithm 1 and Eq. 5 and 7.
    """
    if not 0 < reliability < 1:
        raise InputError(f"re_po: reliability {reliability}: must be between 0 and 1")
    if not 0 <= momentum < 1:
        raise InputError(f"re_po: momentum {momentum}: must be in [0, 1)")

    def init(num_annotators: int) -> State:
        return {"reliability": jnp.full(num_annotators + 1, reliability, jnp.float32)}

    def step(state: State, right: Array, inputs: Inputs) -> State:
        moved = noise.update(
            state["reliability"],
            right,
            inputs.annotators,
            momentum=momentum,
            where=inputs.is_pair,
        )
        return {"reliability": moved}

    own = {"reliability": reliability, "momentum": momentum}
    return _em("re_po", bind(loss), own, init, step, _likelihood)


def learned_rate(loss: Loss) -> Objective:
    """Flip rates, learned with the policy by the likelihood of the labels.

        loss  = -log((1 - e) p + e (1 - p)),    p = s(loss(swapped) - loss(pair))
        e     = the most likely flip rate given the margins of past batches

    `em` weights each label by the posterior of an initially untrained policy, and so
    stays near its prior.  Here, e is estimated from how often large margins agree with
    labels that the policy has not been trained on.  The scale of the margins grows
    during the pass, so a temperature is estimated for each sixteenth of it
    (`jaxpref.noise.running`).  Annotators have rates of their own, partially pooled
    toward a common rate (`jaxpref.noise.annotator_rates`).  In the second pass, the
    policy has seen the labels, and e would be too small.  So only the first pass is
    used, which ends when one of the first pairs returns.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      The marginal likelihood is RE-PO's, Cao et al., 2025, arXiv:2509.24159, Eq. 11.
      The likelihood of rate and temperatures, instead of EM, is ours.
    """
    bound = bind(loss)
    logits = bound.logits()

    def init(num_annotators: int) -> State:
        counts = running.no_counts()
        state = {
            "counts": counts,
            "pooled": running.posterior(counts),
            "first_pass": first_pass.before(),
        }
        if not num_annotators:  # empty arrays cannot be checkpointed
            return state
        table = annotator_rates.no_counts(num_annotators)
        return state | {
            "annotator_counts": table,
            "annotators": annotator_rates.posterior(table, state["pooled"]),
        }

    def losses(inputs: Inputs, state: State) -> Array:
        rate = state["pooled"].rate
        if "annotators" in state:
            rates = jnp.append(state["annotators"].rate, rate)
            rate = of_annotators(rates, inputs.annotators)
        return marginal_nll(logits(inputs), rate)

    def learn(inputs: Inputs, state: State):
        z = logits(inputs)
        followed = first_pass.follow(inputs, state["first_pass"])
        where = inputs.is_pair & ~followed["ended"]
        counts = running.count(state["counts"], z, where=where)
        pooled = running.posterior(counts)
        before = state["pooled"]
        new = {"counts": counts, "pooled": pooled, "first_pass": followed}
        metrics = {
            "noise/flip_rate": before.rate,
            "noise/flip_rate_lower": before.lower,
            "noise/flip_rate_upper": before.upper,
            # 1 if the rate can be quoted, 0 if only the interval can.
            "noise/identified": before.identified.astype(jnp.float32),
            "noise/temperature": before.temperature,
        }
        if "annotators" in state:
            table = annotator_rates.count(
                state["annotator_counts"], counts, z, inputs.annotators, where=where
            )
            new["annotator_counts"] = table
            new["annotators"] = annotator_rates.posterior(table, pooled)
            metrics["noise/annotator_spread"] = state["annotators"].spread
        return new, metrics

    return wrapping("learned_rate", bound, {}, losses=losses, init=init, learn=learn)


def wrapping(
    name: str, bound: BoundLoss, own: Mapping[str, Any], **fields: Any
) -> Objective:
    """An objective that wraps a loss.

    Args:
      name: the name of the objective, without the loss.
      bound: the loss.
      own: the objective's own hyperparameters.
      **fields: further fields of `Objective`.
    """
    return Objective(
        name=f"{name}_{bound.name}",
        options={"loss": {"name": bound.name, **bound.options}, **own},
        metrics=reward_metrics(
            bound.reads, bound.options, per_token=per_token_reward(bound.function)
        ),
        check=check_of(bound),
        **{"reads": bound.logit_reads(), **fields},
    )


def _em(
    name: str,
    bound: BoundLoss,
    own: Mapping[str, Any],
    init: Callable[[int], State],
    step: MStep,
    policy_loss: EStep,
) -> Objective:
    logits = bound.logits()

    def posterior(inputs: Inputs, state: State) -> tuple[Array, Array, Array]:
        z = logits(inputs)
        reliability = of_annotators(state["reliability"], inputs.annotators)
        if inputs.batch.votes is None:
            return z, reliability, noise.posterior(z, reliability)
        return z, reliability, _votes_posterior(z, reliability, inputs.batch)

    def pair_losses(inputs: Inputs, state: State) -> Array:
        z, _, right = posterior(inputs, state)
        values = policy_loss(inputs, z, right)
        # The votes on a pair share one truth, whose likelihood counts once.
        several = inputs.batch.votes is not None
        return values / votes_on_pair(inputs.batch) if several else values

    def learn(inputs: Inputs, state: State):
        _, reliability, right = posterior(inputs, state)
        real = inputs.is_pair
        return step(state, right, inputs), {
            "noise/flip_rate": mean_over(1 - reliability, real),
            "noise/posterior": mean_over(right, real),
            # Known only for injected flips.
            "noise/posterior_flipped": mean_over(right, real & inputs.batch.is_flipped),
        }

    return wrapping(
        name,
        bound,
        own,
        losses=pair_losses,
        init=init,
        learn=learn,
        count=_count_pairs,
    )


def _votes_posterior(z: Array, reliability: Array, batch: PreferenceBatch) -> Array:
    """Posteriors of votes, [..., S V], from logits that are positive for the vote.

    The margin of a pair is the mean over its votes, which only differ if numbers of the
    records do.
    """
    votes = jnp.asarray(batch.votes)
    signed = votes * of_each_pair(z, batch)
    margins = jnp.sum(signed, -1) / jnp.maximum(jnp.sum(votes != 0, -1), 1)
    rates = of_each_pair(reliability, batch)
    return noise.votes_posterior(margins, rates, votes).reshape(z.shape)


def _count_pairs(batch: PreferenceBatch) -> Array:
    """The number of pairs in a batch, however many votes they have."""
    exist = batch.pair_index >= 0 if batch.votes is None else jnp.any(batch.votes, -1)
    return jnp.sum(exist)


def _likelihood(inputs: Inputs, logits: Array, right: Array) -> Array:
    del inputs
    return noise.likelihood_loss(logits, right)


def _soft_counts(
    prior_right: float, prior_wrong: float, memory: float
) -> tuple[Callable[[int], State], MStep]:
    """(init, M-step) of reliabilities estimated from counts of votes."""
    prior = prior_right, prior_wrong

    def init(num_annotators: int) -> State:
        zeros = jnp.zeros(num_annotators + 1, jnp.float32)
        start = noise.estimate(zeros, zeros, prior=prior)
        return {"reliability": start, "right": zeros, "wrong": jnp.zeros_like(zeros)}

    def step(state: State, right_posterior: Array, inputs: Inputs) -> State:
        right, wrong = noise.tally(
            state["right"],
            state["wrong"],
            right_posterior,
            inputs.annotators,
            memory=memory,
            where=inputs.is_pair,
        )
        reliability = noise.estimate(right, wrong, prior=prior)
        return {"reliability": reliability, "right": right, "wrong": wrong}

    return init, step


def _count_options(
    prior_right: float, prior_wrong: float, memory: float
) -> dict[str, float]:
    for name, value in (("prior_right", prior_right), ("prior_wrong", prior_wrong)):
        if not 0 < value < float("inf"):
            raise InputError(f"em: {name} {value}: must be above 0 and finite")
    if not memory > 0:
        raise InputError(f"em: memory {memory}: must be above 0")
    return {"prior_right": prior_right, "prior_wrong": prior_wrong, "memory": memory}


def of_annotators(values: Array, annotators: Array) -> Array:
    """The value of each pair's annotator; the last value if it is unknown (-1).

    Uses comparisons instead of a gather, so that pairs may be sharded in any way.
    """
    index = jnp.where(annotators < 0, len(values) - 1, annotators)
    own = index[..., None] == jnp.arange(len(values))
    return jnp.sum(jnp.where(own, values, 0), axis=-1)
