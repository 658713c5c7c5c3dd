"""What is logged for every objective: log-probabilities and rewards."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref import losses
from jaxpref.objectives.bound_loss import PER_RECORD
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.scoring.scores import scores_read


def per_token_reward(loss: Callable) -> bool:
    """Whether a loss declares that its implicit reward is an average over tokens.

    Losses of `jaxpref.losses` do so with `@reward_per_token`.
    """
    return getattr(loss, "reward_per_token", False)


def reward_metrics(
    reads: tuple[str, ...], options: Mapping[str, Any], *, per_token: bool
) -> Callable[[Inputs], dict[str, jax.Array]]:
    """Means of log-probabilities and rewards over the pairs, with their usual names.

    The reward of a completion y is a reward model's score, or the implicit reward

        beta (log pi(y | x) - log pi_ref(y | x))

    The reference term is left out if the loss reads no reference.  The reward is
    divided by the number of tokens of y if the loss averages over them.  Embeddings
    have no rewards, but margins: the scores of pairs, divided by tau.  Ties count half
    in `rewards/accuracies`.

    Args:
      reads: names of the arrays that the loss reads.
      options: its hyperparameters.  `beta`, or `chosen_beta` and `rejected_beta`, scale
        implicit rewards.
      per_token: whether implicit rewards are averages over tokens.

    Returns:
      A function from the inputs of one model to the metrics.
    """
    scores = scores_read(reads)
    own = [x if x in options else "beta" for x in ("chosen_beta", "rejected_beta")]

    def beta_of(inputs: Inputs, name: str) -> Any:
        """One number, or one per pair, [..., S, 1]."""
        value = options.get(name, 1.0)
        return inputs[name][..., None] if value is PER_RECORD else value

    def of_rewards(inputs: Inputs) -> dict[str, jax.Array]:
        return _of_rewards(inputs, inputs.completions("rewards"))

    def of_logps(inputs: Inputs) -> dict[str, jax.Array]:
        # A third completion, such as a rationale, has no reward.
        logps = inputs.completions("policy_logps")[..., :2]
        chosen = {"logps/chosen": mean_over(logps[..., 0], inputs.is_pair)}
        if logps.shape[-1] == 1:
            return chosen
        reference = 0
        if "reference_logps" in inputs:
            reference = inputs.completions("reference_logps")[..., :2]
        ratios = logps - reference
        sides = ratios[..., :1], ratios[..., 1:]
        scaled = [beta_of(inputs, name) * x for name, x in zip(own, sides)]
        rewards = jnp.concatenate(scaled, axis=-1)
        if per_token:
            lengths = jnp.maximum(inputs.batch.completion_lengths[..., :2], 1)
            rewards = rewards / lengths
        rejected = {"logps/rejected": mean_over(logps[..., 1], inputs.is_pair)}
        return chosen | rejected | _of_rewards(inputs, rewards)

    def of_embeddings(inputs: Inputs) -> dict[str, jax.Array]:
        sides = inputs.arrays(("chosen_embeddings", "rejected_embeddings"))
        tau = inputs["tau"] if options["tau"] is PER_RECORD else options["tau"]
        return _of_margins(inputs, losses.skew_symmetric_score(*sides) / tau)

    if "embeddings" in scores:
        return of_embeddings
    return of_rewards if "rewards" in scores else of_logps


def _of_rewards(inputs: Inputs, rewards: Array) -> dict[str, jax.Array]:
    mean = lambda x: mean_over(x, inputs.is_pair)
    if rewards.shape[-1] == 1:
        return {"rewards/chosen": mean(rewards[..., 0])}
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        **_of_margins(inputs, chosen - rejected),
    }


def _of_margins(inputs: Inputs, margins: Array) -> dict[str, jax.Array]:
    right = losses.reward_accuracies(margins, jnp.zeros_like(margins))
    return {
        "rewards/accuracies": mean_over(right, inputs.is_pair),
        "rewards/margins": mean_over(margins, inputs.is_pair),
    }
