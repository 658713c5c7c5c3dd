"""An objective that finds out by itself what is wrong with the labels."""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.noise import candidates, instance, instance_fit
from jaxpref.noise.instance import Prior
from jaxpref.noise.rate import shrunken_nll
from jaxpref.objectives import pair_rates
from jaxpref.objectives.bound_loss import Loss, bind
from jaxpref.objectives.flip_features import flip_features
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Metrics, Objective, State

ONE_RATE = candidates.NAMES.index("one_rate")
STEPS = 2
"""Steps of the estimate in each step of the policy."""


def auto(
    loss: Loss,
    *,
    length: float = 2.0,
    position: float = 0.0,
    predictor: float = 0.0,
    annotators: float = 1.0,
    preference: float = 0.5,
    memory: int = 8192,
    warmup: int = 512,
) -> Objective:
    """The correction that the labels support, or none; needs no flip rate.

        loss  = -log((1 - e) s(z) + e' s(-z)),    z = loss(swapped) - loss(pair)

    e and e' are the flip rates of the pair, as for `instance_noise`.  Five descriptions
    of the labels are compared in each step: all are correct (e = 0, the likelihood of
    the loss itself); one flip rate; one for each annotator; rates that depend on the
    features; and on both.  The one with the highest posterior probability is used.

    If all annotators follow the length alike, this may be a bias or a preference, and
    the labels cannot say which.  Then they count as correct, or have one flip rate.
    With `length` at 0, rates that depend on the other features are always used, since
    neither position nor predictor is part of an answer's quality.

    With one flip rate, the loss is `rate.shrunken_nll` instead: that of correct labels
    for margins c z, where c is the factor by which flips shrink margins.  The
    likelihood above would trust labels less the more the policy contradicts them,
    which does harm if all annotators share a bias that the policy has learned.

    So the margins grow toward the size that correct labels would give, with the same
    beta.  They stay smaller if the labels determine the flip rate poorly.

    During a warmup, no label is corrected: an untrained policy cannot tell a bias from
    a preference.  Only the first pass over the pairs is used, because in later ones
    the policy has already seen the labels.

    Metrics: `noise/model`, the description in use, from 0 (all correct) to 4 (both);
    `noise/log_odds_NAME`, its posterior log-odds against correct labels, nats;
    `noise/shrinkage`, c; and those of `instance_noise` for the description in use.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      length: prior standard deviation of the effect of length; 0 leaves it out.
      position: the same for the position; needs --columns chosen_first=FIELD.
      predictor: the same for a predictor; needs --columns flip_predictor=FIELD.
      annotators: standard deviation of each coefficient between annotators.
      preference: standard deviation of the policy's error about each feature, nats: how
        much more or less the true preference may depend on it.
      memory: number of the latest labels to learn from, since the margins change.
      warmup: number of labels before the first correction.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      The likelihood is FA-DPO's, Xu et al., 2025, arXiv:2512.00709, with swapped
      features.  The comparison and c are ours (`jaxpref.noise.candidates`).
    """
    bound = bind(loss)
    features = flip_features(
        {"length": length, "position": position, "predictor": predictor}
    )
    prior = Prior(
        even=tuple(features.even.values()),
        odd=tuple(features.odd.values()),
        annotators=annotators,
        preference=preference,
        largest=1.0,  # an annotator may be an adversary
    )
    pair_rates.check("auto", bound, prior, features, memory, warmup)
    logits = bound.logits()
    select = functools.partial(candidates.select, correct_shared=length == 0)

    def init(num_annotators: int) -> State:
        return {
            "coefficients": candidates.initial(prior, num_annotators),
            "log_odds": jnp.zeros(len(candidates.NAMES)),
            "seen": pair_rates.before(prior, memory),
        }

    def rates(inputs: Inputs, state: State) -> tuple[Array, Array]:
        which = select(state["log_odds"])
        now, own = candidates.chosen(state["coefficients"], which, prior=prior)
        x, who = features.read(inputs), inputs.annotators
        one, other = instance.flip_rates(now, x, who, prior=own)
        # Exactly the loss's own likelihood, however large the margin.
        exact = lambda rate: jnp.where(which == 0, 0.0, rate)
        return exact(one), exact(other)

    def pair_losses(inputs: Inputs, state: State) -> Array:
        z, c = logits(inputs), candidates.shrinkage(state["coefficients"])
        of_rates = instance.label_nll(z, *rates(inputs, state))
        has_one_rate = select(state["log_odds"]) == ONE_RATE
        return jnp.where(has_one_rate, shrunken_nll(z, c), of_rates)

    def learn(inputs: Inputs, state: State):
        z, x = logits(inputs), features.read(inputs)
        seen = pair_rates.collect(state["seen"], inputs, z, x, warmup=warmup)
        moved, log_odds = candidates.fit(
            state["coefficients"], seen["labels"], prior=prior, steps=STEPS
        )
        which, old = select(state["log_odds"]), state["seen"]["labels"]
        now, own = candidates.chosen(state["coefficients"], which, prior=prior)
        found = instance_fit.describe(now, old, prior=own)
        metrics = pair_rates.estimate_metrics(found, now.shared, features.names)
        metrics |= pair_rates.posterior_metrics(inputs, z, *rates(inputs, state))
        metrics |= _choice_metrics(state, which)
        return {"coefficients": moved, "log_odds": log_odds, "seen": seen}, metrics

    return wrapping(
        "auto",
        bound,
        {
            "length": length,
            "position": position,
            "predictor": predictor,
            "annotators": annotators,
            "preference": preference,
            "memory": memory,
            "warmup": warmup,
        },
        reads=tuple(dict.fromkeys((*bound.logit_reads(), *features.reads))),
        losses=pair_losses,
        init=init,
        learn=learn,
    )


def _choice_metrics(state: State, which: Array) -> Metrics:
    """The description in use, and its competitors."""
    log_odds = state["log_odds"]
    odds = zip(candidates.NAMES[1:], log_odds[1:])
    return {
        "noise/model": which.astype(jnp.float32),
        "noise/shrinkage": candidates.shrinkage(state["coefficients"]),
        **{f"noise/log_odds_{name}": value for name, value in odds},
    }
