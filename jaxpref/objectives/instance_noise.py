"""An objective that learns how the flip rate depends on the pair."""

from jaxtyping import Array

from jaxpref.noise import instance, instance_fit
from jaxpref.noise.instance import Prior
from jaxpref.objectives import pair_rates
from jaxpref.objectives.bound_loss import Loss, bind
from jaxpref.objectives.flip_features import flip_features
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Objective, State

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
    preference: float = 0.5,
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
    annotator saw the chosen answer first, else -1 (--columns chosen_first=FIELD);
    `predictor`, any number (--columns flip_predictor=FIELD).  Each annotator has its
    own w around a common one.  The options named after features are the prior standard
    deviations of their coefficients; 0 leaves a feature out.

    During a warmup, the rate is constant: for an untrained policy, every dependence of
    the labels on a feature looks like a bias (`jaxpref.noise.instance`).  Coefficients
    that the labels do not determine stay near their prior.  Only the first pass over
    the pairs is used, because later the policy has seen the labels.

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
      preference: standard deviation of the policy's error about each feature, nats: how
        much more or less the true preference may depend on it.
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
    spreads = {"length": length, "likelihood": likelihood, "position": position}
    spreads |= {"predictor": predictor}
    own = {"annotators": annotators, "preference": preference}
    own |= {"rate": rate, "spread": spread, "largest": largest}
    features = flip_features(spreads)
    prior = Prior(
        even=tuple(features.even.values()), odd=tuple(features.odd.values()), **own
    )
    pair_rates.check("instance_noise", bound, prior, features, memory, warmup)
    options = spreads | own | {"memory": memory, "warmup": warmup}
    logits = bound.logits()

    def init(num_annotators: int) -> State:
        return {
            "coefficients": instance.initial(prior, num_annotators),
            "seen": pair_rates.before(prior, memory),
        }

    def rates(inputs: Inputs, state: State) -> tuple[Array, Array]:
        x, who = features.read(inputs), inputs.annotators
        return instance.flip_rates(state["coefficients"], x, who, prior=prior)

    def pair_losses(inputs: Inputs, state: State) -> Array:
        return instance.label_nll(logits(inputs), *rates(inputs, state))

    def learn(inputs: Inputs, state: State):
        z, before = logits(inputs), state["coefficients"]
        collected = pair_rates.collect(
            state["seen"], inputs, z, features.read(inputs), warmup=warmup
        )
        labels = collected["labels"]
        moved = instance_fit.update(before, labels, prior=prior, steps=STEPS)
        found = instance_fit.describe(before, state["seen"]["labels"], prior=prior)
        metrics = pair_rates.estimate_metrics(found, before.shared, features.names)
        metrics |= pair_rates.posterior_metrics(inputs, z, *rates(inputs, state))
        return {"coefficients": moved, "seen": collected}, metrics

    return wrapping(
        "instance_noise",
        bound,
        options,
        reads=tuple(dict.fromkeys((*bound.logit_reads(), *features.reads))),
        losses=pair_losses,
        init=init,
        learn=learn,
    )
