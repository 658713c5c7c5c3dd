"""What training shows of every loss: log-probs, and rewards, implicit or scored."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.scoring.scores import Scores


def reward_metrics(
    scores: Scores,
    batch: PreferenceBatch,
    per_token: bool,
    options: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Means over the pairs of log-probs and rewards, under the field's names.

    Rewards are a reward model's scores, and there are no log-probs then; or implicit,
    in the loss's own convention: beta (log pi - log pi_ref) where it reads a reference,
    beta log pi where it does not, averaged over tokens where it averages them.  Ties
    count half in `rewards/accuracies`.
    """
    mask = batch.pairs >= 0
    pairs = jnp.maximum(jnp.sum(mask), 1)
    mean = lambda x: jnp.sum(jnp.where(mask, x, 0.0)) / pairs
    if "rewards" in scores:
        return _of_rewards(scores["rewards"], mean)
    logps = scores["policy_logps"]
    metrics = {"logps/chosen": mean(logps[..., 0])}
    if logps.shape[-1] == 1:
        return metrics
    reference = dict(batch.reference) | scores
    beta = options.get("beta", 1.0)
    betas = [options.get(f"{side}_beta", beta) for side in ("chosen", "rejected")]
    rewards = jnp.array(betas, logps.dtype) * (
        logps - reference.get("reference_logps", 0)
    )
    if per_token:
        rewards = rewards / jnp.maximum(batch.completion_lengths, 1)
    metrics |= {"logps/rejected": mean(logps[..., 1])}
    return metrics | _of_rewards(rewards, mean)


def _of_rewards(rewards: jax.Array, mean: Callable) -> dict[str, jax.Array]:
    if rewards.shape[-1] == 1:
        return {"rewards/chosen": mean(rewards[..., 0])}
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean(losses.reward_accuracies(chosen, rejected)),
        "rewards/margins": mean(chosen - rejected),
    }


def averages_tokens(
    loss: Callable, reads: tuple[str, ...], options: Mapping[str, Any]
) -> bool:
    """Whether the loss looks at log-probs a token: then so do the reward metrics.

    Told by its pull on the rejected answer, which halves where all answers are twice as
    long and as unlikely, and the policy still equals its reference.
    """
    if not {"policy_rejected_logps", "rejected_lengths"} <= set(reads):
        return False

    def pull(tokens: float):
        def summed(rejected):
            arrays = {name: jnp.full(1, -tokens) for name in reads}
            arrays |= {n: jnp.full(1, tokens) for n in reads if n.endswith("lengths")}
            arrays |= {n: jnp.float32(0) for n in reads if n.startswith("running_")}
            if "reliabilities" in reads:
                arrays["reliabilities"] = jnp.full(1, 0.75)
            arrays["policy_rejected_logps"] = rejected
            return jnp.sum(loss(*arrays.values(), **options))

        return float(jax.grad(summed)(jnp.full(1, -tokens))[0])

    return abs(pull(2.0) / pull(1.0) - 0.5) < 1e-3
