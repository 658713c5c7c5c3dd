"""Objectives of single answers: supervised fine-tuning, and regression on ratings."""

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.data.columns import HELPSTEER2, RATING, names_of
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import arrays_of
from jaxpref.objectives.inputs import Inputs, mean_over
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


def attribute_regression(*, attributes: tuple[str, ...] = HELPSTEER2) -> Objective:
    """Mean squared distance of an answer's predicted ratings from its ratings.

        loss = mean over the rated attributes a of (r_a - rating_a)^2

    Records are single answers, and the rating of an attribute is in the field of its
    name unless `--columns rating.ATTRIBUTE=FIELD` names another.  A rating that is
    absent or null is left out.  The head has one number for each attribute.

    Metrics: `mae/ATTRIBUTE`, the mean distance.

    Args:
      attributes: names of the attributes, separated by commas.

    Raises:
      InputError: if there are no attributes, or one is named twice.
    """
    names = names_of(attributes)
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"attribute_regression: attributes {','.join(names)!r}: name one or more, "
            "each once, as in --loss.attributes helpfulness,verbosity"
        )

    def ratings(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """The predicted ratings and the ratings, [..., S, A]."""
        found = [inputs[RATING + name] for name in names]
        return inputs.completions("attributes")[..., 0, :], jnp.stack(found, axis=-1)

    def metrics(inputs: Inputs) -> dict[str, jax.Array]:
        predicted, rated = ratings(inputs)
        there = inputs.is_pair[..., None] & ~jnp.isnan(rated)
        distances = jnp.abs(predicted - jnp.where(there, rated, 0))
        return {
            f"mae/{name}": mean_over(distances[..., n], there[..., n])
            for n, name in enumerate(names)
        }

    return Objective(
        name="attribute_regression",
        options={"attributes": names},
        reads=("attributes", *(RATING + name for name in names)),
        losses=lambda inputs, state: losses.attribute_regression(*ratings(inputs)),
        metrics=metrics,
    )
