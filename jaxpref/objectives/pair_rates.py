"""What objectives that learn the flip rate of each pair share."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.noise import instance, instance_fit, instance_labels
from jaxpref.noise.instance import Features, Prior
from jaxpref.objectives import first_pass
from jaxpref.objectives.bound_loss import BoundLoss
from jaxpref.objectives.flip_features import FlipFeatures
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, State

MOST_MEMORY = 1_000_000
"""The largest `memory` allowed: all of it is read in every step."""


def check(
    name: str,
    bound: BoundLoss,
    prior: Prior,
    features: FlipFeatures,
    memory: int,
    warmup: int,
) -> None:
    """Checks the options of the objective `name`.

    Raises:
      InputError: if one is wrong.
    """
    try:
        instance.check(prior)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    if not 0 < memory <= MOST_MEMORY:
        raise InputError(f"{name}: memory {memory}: must be from 1 to {MOST_MEMORY:,}")
    if warmup < 0:
        raise InputError(f"{name}: warmup {warmup}: must be 0 or more")
    if "likelihood" in features.names and "chosen_rewards" in bound.reads:
        raise InputError(
            f"{name}: likelihood: {bound.name} trains a reward model, which has no "
            "log-probabilities; leave it out"
        )


def before(prior: Prior, memory: int) -> State:
    """The state before the first batch: no labels."""
    return {
        "labels": instance_labels.no_labels(prior, memory),
        "count": jnp.zeros((), jnp.int32),
        "first_pass": first_pass.before(),
    }


def collect(
    state: State,
    inputs: Inputs,
    margin_logits: Float[Array, "*batch S"],
    features: Features,
    *,
    warmup: int,
) -> State:
    """Adds the labels of a batch, after the warmup and in the first pass.

    Args:
      state: from `before` or an earlier call.
      inputs: the batch.
      margin_logits: z of the policy before it is trained on the batch, nats.
      features: of the pairs as labeled.
      warmup: number of labels to leave out.
    """
    followed = first_pass.follow(inputs, state["first_pass"])
    real = inputs.is_pair & ~followed["ended"]
    new = instance_labels.flat(
        margin_logits, features, inputs.annotators, real & (state["count"] >= warmup)
    )
    return {
        "labels": instance_labels.remember(state["labels"], new),
        "count": state["count"] + jnp.sum(real, dtype=jnp.int32),
        "first_pass": followed,
    }


def estimate_metrics(
    found: instance_fit.Estimate, weights: Float[Array, " P"], names: tuple[str, ...]
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


def posterior_metrics(
    inputs: Inputs, margin_logits: Array, rate: Array, swapped_rate: Array
) -> Metrics:
    """The mean probability that a label is right, also of injected flips."""
    right = instance.probability_right(margin_logits, rate, swapped_rate)
    flipped = inputs.is_pair & inputs.batch.is_flipped
    return {
        "noise/posterior": mean_over(right, inputs.is_pair),
        # Known only for injected flips.
        "noise/posterior_flipped": mean_over(right, flipped),
    }
