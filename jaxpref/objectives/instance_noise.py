"""Objectives for flip rates that differ between pairs: learned, or known.

`instance_noise` learns how the flip rate depends on the pair, together with the policy.
`known_rates` takes the rate of each pair from its record.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.errors import InputError
from jaxpref.noise import instance, instance_fit
from jaxpref.noise.instance import Features, Prior
from jaxpref.noise.rate import marginal_nll
from jaxpref.objectives.bound_loss import BoundLoss, Loss, bind
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Metrics, Objective, State

READS = {
    "length": ("chosen_lengths", "rejected_lengths"),
    "likelihood": (
        "reference_chosen_logps",
        "reference_rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
    ),
    "position": ("chosen_first",),
    "predictor": ("flip_predictors",),
}
"""What each feature is computed from."""
MOST_MEMORY = 1_000_000
"""The largest `memory` allowed: all of it is read in every step."""
STEPS = 2
"""Steps of the estimate in each step of the policy."""


def instance_noise(
    loss: Loss,
    *,
    length: float = 2.0,
    likelihood: float = 0.0,
    position: float = 0.0,
    predictor: float = 0.0,
    annotators: float = 1.0,
    rate: float = 0.1,
    spread: float = 1.0,
    largest: float = 0.5,
    memory: int = 8192,
    warmup: int = 4096,
) -> Objective:
    """Flip rates that depend on the pair, learned with the policy.

        loss  = -log((1 - e) p + e' (1 - p)),    p = s(loss(swapped) - loss(pair))
        e     = largest s(w . features)            if the labeled answer is better
        e'    = largest s(w . features swapped)    if the other answer is better

    Features: a constant; `length` = tanh(2 log(|y_w| / |y_l|)); `likelihood` = tanh of
    the difference of the reference's log-probabilities per token; `position`, 1 if the
    annotator saw the chosen answer first, else -1 (--labels.chosen-first FIELD);
    `predictor`, any number (--labels.flip-predictors FIELD).  Each annotator has its
    own w around a common one.  The options named after features are the prior standard
    deviations of their coefficients; 0 leaves a feature out.

    During a warmup, the rate is constant: for an untrained policy, every dependence of
    the labels on a feature looks like a bias (`jaxpref.noise.instance`).  Coefficients
    that the labels do not determine stay near their prior.  In later epochs, the policy
    has seen the labels, and the flip rates come out too small.

    Metrics: `noise/flip_rate` with an interval, `noise/identified`, and
    `noise/flip_rate_spread`, the standard deviation over pairs; the posterior
    probability that a label is right, as for `em`; `noise/coefficient_NAME`, and
    `noise/information_NAME` from 0 (only the prior) to 1 (only the labels).

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      length: prior standard deviation of the effect of length.
      likelihood: the same for the likelihood under the reference.
      position: the same for the position.
      predictor: the same for the predictor.
      annotators: standard deviation of each coefficient between annotators; 0 if all
        are alike.
      rate: the flip rate expected before any label, between 0 and largest.
      spread: standard deviation of the logit of rate / largest.
      largest: the largest possible flip rate; above 1/2 for adversaries, up to 1.
      memory: number of the latest labels to learn from, since the margins change.
      warmup: number of labels until the rates are learned.  Before, the rate is
        constant: an untrained policy cannot tell a bias from a preference.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      The flip rate as a logistic function of features, learned with the policy: Xu et
      al., FA-DPO, 2025, arXiv:2512.00709.  Swapped features, annotators, and the
      estimate are ours.
    """
    bound = bind(loss)
    odd = {"length": length, "likelihood": likelihood, "position": position}
    spreads = odd | {"predictor": predictor}
    used = {name: x for name, x in spreads.items() if x}
    odd = {name: x for name, x in used.items() if name in odd}
    even = {name: x for name, x in used.items() if name not in odd}
    own = {"annotators": annotators, "rate": rate, "spread": spread, "largest": largest}
    prior = Prior(even=tuple(even.values()), odd=tuple(odd.values()), **own)
    names = (*even, *odd)
    _check(bound, prior, names, memory, warmup)
    options = spreads | own | {"memory": memory, "warmup": warmup}
    logits = bound.logits()

    def read(inputs: Inputs) -> tuple[Array, Features, Array]:
        stack = lambda names: _stacked(inputs, names)
        return logits(inputs), Features(stack(even), stack(odd)), inputs.annotators

    def init(num_annotators: int) -> State:
        return {
            "coefficients": instance.initial(prior, num_annotators),
            "labels": instance_fit.no_labels(prior, memory),
            "seen": jnp.zeros((), jnp.int32),
        }

    def pair_losses(inputs: Inputs, state: State) -> Array:
        z, features, annotators = read(inputs)
        now = state["coefficients"]
        rates = instance.flip_rates(now, features, annotators, prior=prior)
        return instance.label_nll(z, *map(jax.lax.stop_gradient, rates))

    def learn(inputs: Inputs, state: State):
        (z, features, annotators), before = read(inputs), state["coefficients"]
        rates = instance.flip_rates(before, features, annotators, prior=prior)
        right = instance.probability_right(z, *rates)
        learned_from = inputs.is_pair & (state["seen"] >= warmup)
        new = instance_fit.flat(z, features, annotators, learned_from)
        labels = instance_fit.remember(state["labels"], new)
        moved = instance_fit.fit(before, labels, prior=prior, steps=STEPS)
        found = instance_fit.describe(before, state["labels"], prior=prior)
        metrics = _metrics(found, before.common[1:], names)
        flipped = inputs.is_pair & inputs.batch.is_flipped
        seen = state["seen"] + jnp.sum(inputs.is_pair, dtype=jnp.int32)
        after = {"coefficients": moved, "labels": labels, "seen": seen}
        return after, metrics | {
            "noise/posterior": mean_over(right, inputs.is_pair),
            # Known only for injected flips.
            "noise/posterior_flipped": mean_over(right, flipped),
        }

    more = dict.fromkeys(array for name in names for array in READS[name])
    return wrapping(
        "instance_noise",
        bound,
        options,
        reads=tuple(dict.fromkeys((*bound.logit_reads(), *more))),
        losses=pair_losses,
        init=init,
        learn=learn,
    )


def known_rates(loss: Loss) -> Objective:
    """Each pair's own flip rate, from a field of its record.

        loss  = -log((1 - e) p + e (1 - p)),    p = s(loss(swapped) - loss(pair))

    1 - e is the probability that the label is right (--labels.p-correct FIELD), such as
    the field `p_correct` that an audit writes, or a reward model's estimate for the
    pair.  At e = 0 this is the uncorrected likelihood, at 1/2 the pair has no gradient,
    and above 1/2 the label counts as reversed.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.

    Raises:
      InputError: if the loss couples the pairs of a batch.

    References:
      Xu et al., FA-DPO, 2025, arXiv:2512.00709, with given flip rates.
    """
    bound = bind(loss)
    logits = bound.logits()

    def learn(inputs: Inputs, state: State):
        rate = mean_over(1 - inputs["p_correct"], inputs.is_pair)
        return state, {"noise/flip_rate": rate}

    return wrapping(
        "known_rates",
        bound,
        {},
        reads=(*bound.logit_reads(), "p_correct"),
        losses=lambda inputs, state: marginal_nll(
            logits(inputs), 1 - inputs["p_correct"]
        ),
        learn=learn,
    )


def _metrics(
    found: instance_fit.Estimate, weights: Array, names: tuple[str, ...]
) -> Metrics:
    """The estimate, and the coefficients of the constant and of the named features."""
    metrics = {
        "noise/flip_rate": found.rate,
        "noise/flip_rate_lower": found.lower,
        "noise/flip_rate_upper": found.upper,
        "noise/flip_rate_spread": found.spread,
        # 1 if the rate can be quoted, 0 if only the interval can.
        "noise/identified": found.identified.astype(jnp.float32),
    }
    for n, name in enumerate(("constant", *names)):
        metrics[f"noise/coefficient_{name}"] = weights[n]
        metrics[f"noise/information_{name}"] = found.information[n]
    return metrics


def _check(
    bound: BoundLoss, prior: Prior, names: tuple[str, ...], memory: int, warmup: int
) -> None:
    try:
        instance.initial(prior, 0)
    except ValueError as error:
        raise InputError(f"instance_noise: {error}") from error
    if not 0 < memory <= MOST_MEMORY:
        raise InputError(
            f"instance_noise: memory {memory}: must be from 1 to {MOST_MEMORY:,}"
        )
    if warmup < 0:
        raise InputError(f"instance_noise: warmup {warmup}: must be 0 or more")
    if "likelihood" in names and "chosen_rewards" in bound.reads:
        raise InputError(
            f"instance_noise: likelihood: {bound.name} trains a reward model, which has"
            " no log-probabilities; leave it out"
        )


def _stacked(inputs: Inputs, names) -> Array:
    """The features of the pairs as labeled, [..., S, features]; no gradients."""
    columns = [_feature(inputs, name) for name in names]
    if not columns:  # sharded as the pairs are
        return inputs.annotators[..., None][..., :0].astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.stack(columns, axis=-1))


def _feature(inputs: Inputs, name: str) -> Array:
    values = inputs.arrays(READS[name])
    if name == "length":
        chosen, rejected = values
        return jnp.tanh(2 * (jnp.log(chosen) - jnp.log(rejected)))
    if name == "likelihood":
        chosen, rejected, chosen_length, rejected_length = values
        return jnp.tanh(chosen / chosen_length - rejected / rejected_length)
    if name == "position":
        return 2 * values[0] - 1
    return values[0]
