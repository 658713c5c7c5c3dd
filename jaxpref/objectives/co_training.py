"""Collaborative reward modeling: two models that select each other's pairs.

The mathematics is in `jaxpref.noise.peer`.  The scores of the two models are
`inputs.of("one")` and `inputs.of("two")`.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.noise.peer import kept_share, peer_selection
from jaxpref.objectives.bound_loss import Loss, bind, check_of
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Objective, State
from jaxpref.objectives.rewards import per_token_reward, reward_metrics


def crm(loss: Loss, *, noise_rate: float, ramp_steps: float = 100.0) -> Objective:
    """CRM: two reward models or policies that select each other's pairs.

        keep   = 1 - noise_rate min(1, step / ramp_steps)
        easy_m = the batch's round(keep n) pairs with the largest
                 loss(swapped) - loss(pair) under model m
        loss   = mean over easy_two of the loss under model one
                 + mean over easy_one of the loss under model two

    Two policies (CRM-DPO) start from the same weights, and equal models would stay
    equal.  Up to `ramp_steps`, each pair therefore trains only one of the two, by its
    position in the batch.  Use large batches, since selection is within a batch.
    Evaluation uses model one on all pairs.  The gradients of both models share
    `max_grad_norm`.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      noise_rate: share of wrong labels, in [0, 1); known, or estimated, for example by
        `jaxpref audit` or `em`.
      ramp_steps: optimizer steps until that share of the pairs is dropped, > 0; the
        published schedule takes three epochs.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Zhang et al., CRM, 2025, arXiv:2505.10597, peer review within the batch; schedule
      of Han et al., Co-teaching, 2018, arXiv:1804.06872.  The paper does not describe
      how two policies stay different; our rule is the one above.
    """
    _check(noise_rate, ramp_steps)
    bound = bind(loss)
    logits = bound.logits()
    both = lambda inputs: (inputs.of("one"), inputs.of("two"))
    keep_at = lambda steps: kept_share(
        steps, noise_rate=noise_rate, ramp_epochs=ramp_steps
    )
    metrics_of_one = reward_metrics(
        bound.reads, bound.options, per_token=per_token_reward(bound.function)
    )

    def pair_losses(inputs: Inputs, steps: State) -> Array:
        real = inputs.is_pair
        margins = [jax.lax.stop_gradient(logits(model)) for model in both(inputs)]
        selections = peer_selection(*margins, keep=keep_at(steps), where=real)
        total: Any = 0.0
        for parity, (model, selected) in enumerate(zip(both(inputs), selections)):
            selected &= alternate(real, steps, parity) | (steps >= ramp_steps)
            # Rescaled so that the result is the mean over the selected pairs.
            share = jnp.sum(real) / jnp.maximum(jnp.sum(selected), 1)
            total += jnp.where(selected, bound(model) * share, 0)
        return total

    def compare(inputs: Inputs, steps: State) -> dict[str, Array]:
        margins = [logits(model) for model in both(inputs)]
        return agreement_metrics(margins, keep_at(steps), inputs)

    return Objective(
        name=f"crm_{bound.name}",
        options={
            "loss": {"name": bound.name, **bound.options},
            "noise_rate": noise_rate,
            "ramp_steps": ramp_steps,
        },
        reads=bound.logit_reads(),
        losses=pair_losses,
        metrics=lambda inputs: metrics_of_one(inputs.of("one")),
        init=lambda _: jnp.zeros((), jnp.int32),
        learn=lambda inputs, steps: (steps + 1, compare(inputs, steps)),
        # Evaluates the first model on all pairs.
        evaluate=lambda inputs, steps: (
            bound(inputs.of("one")),
            compare(inputs, steps),
        ),
        couples=bound.logit_reads(),
        check=check_of(bound),
        num_models=2,
    )


def _check(noise_rate: float, ramp_steps: float) -> None:
    if not 0 <= noise_rate < 1:
        raise InputError(f"crm: noise_rate {noise_rate}: must be in [0, 1)")
    if not 0 < ramp_steps < float("inf"):
        raise InputError(f"crm: ramp_steps {ramp_steps}: must be above 0 and finite")


def alternate(pairs: Array, steps: Array, parity: int) -> Array:
    """Every other pair of the batch; with each step, a pair changes its parity."""
    place = jnp.arange(pairs.size).reshape(pairs.shape)
    return (place + steps) % 2 == parity


def agreement_metrics(
    margins: list[Float[Array, "*pairs"]], keep: Float[Array, ""], inputs: Inputs
) -> dict[str, Float[Array, ""]]:
    """How the two models compare on a batch, and what they select for each other."""
    real = inputs.is_pair
    selected = jnp.stack(peer_selection(*margins, keep=keep, where=real))
    flipped = cast(Array, inputs.batch.is_flipped)
    wins = lambda z: jnp.where(z == 0, 0.5, (z > 0).astype(z.dtype))
    return {
        "crm/kept": keep,
        "crm/accuracies_two": mean_over(wins(margins[1]), real),
        "crm/agreement": mean_over((margins[0] > 0) == (margins[1] > 0), real),
        # Known only for injected flips.
        "crm/kept_flipped": mean_over(flipped, selected),
    }
