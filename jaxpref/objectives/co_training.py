"""Collaborative reward modeling: two models that select each other's pairs.

The mathematics is in `jaxpref.noise.peer`.  The scores of the two models are
`inputs.of("one")` and `inputs.of("two")`.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.errors import InputError
from jaxpref.noise.peer import curriculum, kept_share, peer_selection
from jaxpref.objectives.bound_loss import Loss, bind, check_of
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Objective
from jaxpref.objectives.rewards import per_token_reward, reward_metrics
from jaxpref.sharding import replicated

MEMORY = 1024
"""The latest pairs among which the curriculum ranks those of a batch."""
FIRST_SHARE = 0.5
"""The share of pairs that the curriculum admits at the start of an epoch."""

Margins = list[Float[Array, "*pairs"]]
"""The margins of the pairs of a batch under each model."""


class Progress(NamedTuple):
    """What CRM remembers besides the models."""

    steps: Int[Array, ""]
    """Optimizer steps so far."""
    latest: Float[Array, "2 memory"]
    """The margins of the latest pairs under each model; NaN where there is none, and
    without any pairs if there is no curriculum."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which pairs each of the two models trains on; see `crm`."""

    noise_rate: float
    ramp_steps: float
    peer_review: bool
    epoch_steps: int

    def __post_init__(self):
        rate, ramp, epoch = self.noise_rate, self.ramp_steps, self.epoch_steps
        if not 0 <= rate < 1:
            raise InputError(f"crm: noise_rate {rate}: must be in [0, 1)")
        if not 0 < ramp < float("inf"):
            raise InputError(f"crm: ramp_steps {ramp}: must be above 0 and finite")
        if epoch < 0:
            raise InputError(f"crm: epoch_steps {epoch}: must be 0 or more")
        if not (self.peer_review or epoch):
            raise InputError(
                "crm: peer_review false: give epoch_steps, the steps of one pass over "
                "the pairs, or nothing selects pairs"
            )

    def begin(self) -> Progress:
        """The state before the first step."""
        memory = MEMORY if self.epoch_steps else 0
        latest = jnp.full((2, memory), jnp.nan, jnp.float32)
        return Progress(jnp.zeros((), jnp.int32), latest)

    def __call__(
        self, margins: Margins, real: Bool[Array, "*pairs"], progress: Progress
    ) -> tuple[Bool[Array, "*pairs"], Bool[Array, "*pairs"]]:
        """The pairs of a batch that models one and two train on."""
        steps = progress.steps
        keep = kept_share(
            steps, noise_rate=self.noise_rate, ramp_epochs=self.ramp_steps
        )
        admitted = real
        if self.epoch_steps:
            share = admitted_share(steps, epoch_steps=self.epoch_steps)
            share *= 1 if self.peer_review else keep
            admitted = easiest(margins, real, progress.latest, share=share)
        if not self.peer_review:
            return admitted, admitted
        for_one, for_two = peer_selection(*margins, keep=keep, where=real)
        return for_one & admitted, for_two & admitted


def crm(
    loss: Loss,
    *,
    noise_rate: float,
    ramp_steps: float = 100.0,
    peer_review: bool = True,
    epoch_steps: int = 0,
) -> Objective:
    """CRM: two reward models or policies that select each other's pairs.

        keep   = 1 - noise_rate min(1, step / ramp_steps)
        easy_m = the batch's round(keep n) pairs with the largest margin
                 loss(swapped) - loss(pair) under model m
        loss   = mean over easy_two of the loss under model one
                 + mean over easy_one of the loss under model two

    That is the peer review.  The curriculum admits pairs from easy to hard in every
    epoch after the first: at a fraction f of it, those among the easiest half + f / 2
    of the latest 1,024 pairs, by the sum of both margins.  Without peer review, it
    admits no more than `keep`, so that the hardest pairs are never trained on.

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
      peer_review: each model trains on the pairs that the other finds easy.
      epoch_steps: optimizer steps of one pass over the pairs, for the curriculum; 0
        for none.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Zhang et al., CRM, 2025, arXiv:2505.10597, peer review within the batch and
      curriculum within the epoch; schedule of Han et al., Co-teaching, 2018,
      arXiv:1804.06872.  The paper sorts each epoch; a stream of shuffled batches is not
      sorted, so the curriculum is that of Platanios et al., 2019, arXiv:1903.09848,
      which samples from an easy share that grows.  The paper does not describe how two
      policies stay different; our rule is the one above.
    """
    selection = Selection(noise_rate, ramp_steps, peer_review, epoch_steps)
    bound = bind(loss)
    logits = bound.logits()
    both = lambda inputs: (inputs.of("one"), inputs.of("two"))
    margins_of = lambda inputs: [
        jax.lax.stop_gradient(logits(model)) for model in both(inputs)
    ]
    metrics_of_one = reward_metrics(
        bound.reads, bound.options, per_token=per_token_reward(bound.function)
    )

    def pair_losses(inputs: Inputs, progress: Progress) -> Array:
        real, steps = inputs.is_pair, progress.steps
        selections = selection(margins_of(inputs), real, progress)
        total: Any = 0.0
        for parity, (model, selected) in enumerate(zip(both(inputs), selections)):
            selected &= alternate(real, steps, parity) | (steps >= ramp_steps)
            # Rescaled so that the result is the mean over the selected pairs.
            share = jnp.sum(real) / jnp.maximum(jnp.sum(selected), 1)
            total += jnp.where(selected, bound(model) * share, 0)
        return total

    def compare(inputs: Inputs, progress: Progress) -> dict[str, Array]:
        margins = margins_of(inputs)
        selected = jnp.stack(selection(margins, inputs.is_pair, progress))
        return agreement_metrics(margins, selected, inputs)

    def learn(inputs: Inputs, progress: Progress) -> tuple[Progress, dict[str, Array]]:
        latest = remember(margins_of(inputs), inputs.is_pair, progress.latest)
        return Progress(progress.steps + 1, latest), compare(inputs, progress)

    return Objective(
        name=f"crm_{bound.name}",
        options={
            "loss": {"name": bound.name, **bound.options},
            **dataclasses.asdict(selection),
        },
        reads=bound.logit_reads(),
        losses=pair_losses,
        metrics=lambda inputs: metrics_of_one(inputs.of("one")),
        init=lambda _: selection.begin(),
        learn=learn,
        # Evaluates the first model on all pairs.
        evaluate=lambda inputs, progress: (
            bound(inputs.of("one")),
            compare(inputs, progress),
        ),
        couples=bound.logit_reads(),
        check=check_of(bound),
        num_models=2,
    )


def alternate(pairs: Array, steps: Array, parity: int) -> Array:
    """Every other pair of the batch; with each step, a pair changes its parity."""
    place = jnp.arange(pairs.size).reshape(pairs.shape)
    return (place + steps) % 2 == parity


def admitted_share(steps: Int[Array, ""], *, epoch_steps: int) -> Float[Array, ""]:
    """The share of pairs that the curriculum admits.

        out = 1                                   in the first epoch
              1/2 + 1/2 (step mod epoch) / epoch  afterward

    Margins say nothing before the models have seen the pairs once.
    """
    fraction = (steps % epoch_steps) / epoch_steps
    growing = FIRST_SHARE + (1 - FIRST_SHARE) * fraction
    return jnp.where(steps < epoch_steps, 1.0, growing)


def easiest(
    margins: Margins,
    real: Bool[Array, "*pairs"],
    latest: Float[Array, "2 memory"],
    *,
    share: Float[Array, ""],
) -> Bool[Array, "*pairs"]:
    """Which pairs of a batch are among the easiest of the batch and the latest pairs.

    See `jaxpref.noise.peer.curriculum`.
    """
    one, two = (
        jnp.concatenate([old, flat(x)]) for old, x in zip(latest, margins, strict=True)
    )
    known = jnp.concatenate([~jnp.isnan(latest[0]), flat(real)])
    order, count = curriculum(one, two, keep=share, where=known)
    place = jnp.argsort(order)[latest.shape[1] :]
    return real & (place < count).reshape(real.shape)


def remember(
    margins: Margins, real: Bool[Array, "*pairs"], latest: Float[Array, "2 memory"]
) -> Float[Array, "2 memory"]:
    """The latest pairs with those of a batch, the oldest first."""
    new = jnp.stack([flat(jnp.where(real, x, jnp.nan)) for x in margins])
    both = jnp.concatenate([latest, new.astype(latest.dtype)], axis=1)
    # Slots without a pair go first, so that they push no pair out.
    both = both[:, jnp.argsort(~jnp.isnan(both[0]), stable=True)]
    return both[:, both.shape[1] - latest.shape[1] :]


def flat(x: Array) -> Array:
    """All pairs of the global batch on one axis."""
    return replicated(x).reshape(-1)


def agreement_metrics(
    margins: Margins, selected: Bool[Array, "2 *pairs"], inputs: Inputs
) -> dict[str, Float[Array, ""]]:
    """How the two models compare on a batch, and which pairs they train on."""
    real = inputs.is_pair
    flipped = cast(Array, inputs.batch.is_flipped)
    wins = lambda z: jnp.where(z == 0, 0.5, (z > 0).astype(z.dtype))
    return {
        "crm/kept": mean_over(jnp.mean(selected, axis=0), real),
        "crm/accuracies_two": mean_over(wins(margins[1]), real),
        "crm/agreement": mean_over((margins[0] > 0) == (margins[1] > 0), real),
        # Known only for injected flips.
        "crm/kept_flipped": mean_over(flipped, selected),
    }
