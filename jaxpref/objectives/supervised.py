"""Objectives of single answers: supervised fine-tuning, and regression on ratings."""

import jax.numpy as jnp

from jaxpref import losses
from jaxpref.objectives.bound_loss import arrays_of
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import Objective
from jaxpref.objectives.rewards import reward_metrics


def sft() -> Objective:
    """Supervised fine-tuning: mean negative log-likelihood of the completion tokens."""
    reads = arrays_of(losses.sft)
    return Objective(
        name="sft",
        options={},
        reads=reads,
        losses=lambda inputs, state: losses.sft(*inputs.arrays(reads)),
        metrics=reward_metrics(reads, {}, per_token=False),
        count=lambda batch: jnp.sum(batch.completion_lengths[..., 0]),
    )


def reward_regression() -> Objective:
    """Mean squared distance of both answers' rewards from their ratings.

        loss = [(r_w - rating_w)^2 + (r_l - rating_l)^2] / 2

    It does not read which answer was preferred.  A flip swaps the ratings with the
    answers, and so changes nothing.
    """

    def pair_losses(inputs: Inputs, state):
        del state
        chosen, rejected = (
            losses.reward_regression(
                inputs[f"{side}_rewards"], inputs[f"{side}_rating"]
            )
            for side in ("chosen", "rejected")
        )
        return 0.5 * (chosen + rejected)

    reads = ("chosen_rewards", "rejected_rewards", "chosen_rating", "rejected_rating")
    return Objective(
        name="reward_regression",
        options={},
        reads=reads,
        losses=pair_losses,
        metrics=reward_metrics(reads, {}, per_token=False),
    )
