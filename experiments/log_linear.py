"""Log-linear policies on a finite set of reviews: probabilities, training, measures.

    pi(y|x) = ref(y|x) exp(theta . f(x, y)) / Z(x),    ref(y|x) uniform

So log-probabilities, rewards, and KLs to the reference are exact sums.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.leaderboard_world import World
from jaxpref.data import PreferenceBatch
from jaxpref.objectives import Objective
from jaxpref.scoring.scores import Scored
from jaxpref.train import OptimizerConfig
from jaxpref.train.gradient import gradient
from jaxpref.train.optimizer import make_optimizer, make_schedule


def log_policy(world: World, theta) -> jax.Array:
    """Log-probability of every answer, [prompts, reviews]."""
    return jax.nn.log_softmax(all_logits(world, theta), axis=1)


def all_logits(world: World, theta) -> jax.Array:
    """The product theta f(x, y) of every answer, [prompts, reviews]."""
    features = jnp.asarray(world.features, theta.dtype)
    return (features @ theta).reshape(world.rewards.shape)


def one_pass(
    objective: Objective,
    scores: Callable[[Any, PreferenceBatch], Scored],
    make_batch: Callable[[dict[str, Any], Any], PreferenceBatch],
    records: dict[str, Any],
    *,
    start: Any,
    annotators: int = 0,
    learning_rate: Any,
) -> Any:
    """The parameters after one pass, with gradient and optimizer of `jaxpref.train`.

    Args:
      objective: what is minimized.
      scores: `(params, micro-batch) -> Scored`.
      make_batch: `(records of a step, step) -> batch`.
      records: arrays [steps, batch, ...] by name.
      start: the parameters before it.
      annotators: number of known annotators.
      learning_rate: the peak of the schedule.
    """
    steps = len(records["answers"])
    config = OptimizerConfig(learning_rate=1.0)
    optimizer = make_optimizer(config, make_schedule(config, steps))

    def step(carry, step_and_records):
        params, optimizer_state, state = carry
        batch = make_batch(step_and_records[1], step_and_records[0])
        grads, state, _ = gradient(objective, scores, params, batch, state)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        # AdamW's updates are proportional to the learning rate without weight decay.
        move = lambda p, u: p + learning_rate * u
        return (jax.tree.map(move, params, updates), optimizer_state, state), None

    carry = start, optimizer.init(start), objective.init(annotators)
    (params, *_), _ = jax.lax.scan(step, carry, (jnp.arange(steps), records))
    return params


def measure(world: World, theta) -> dict[str, jax.Array]:
    """Exact reward of a policy, and its KL to the reference in nats."""
    logps = log_policy(world, theta)
    p = jnp.exp(logps)
    reward = jnp.mean(jnp.sum(p * world.rewards, axis=1))
    kl = jnp.mean(jnp.sum(p * (logps + np.log(p.shape[1])), axis=1))
    return {"reward": reward, "kl": jnp.maximum(kl, 0.0)}


def reward_at_kl(world: World, theta, kl: float) -> jax.Array:
    """Exact reward of exp(c theta . f), where c > 0 is such that the KL is `kl`.

    The KL increases with c, so c is found by bisection.  A direction that cannot reach
    the KL gets a reward at the largest c that is tried.
    """

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        above = measure(world, jnp.exp(middle) * unit)["kl"] > kl
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    unit = theta / jnp.maximum(jnp.linalg.norm(theta), jnp.finfo(theta.dtype).tiny)
    low, high = jax.lax.fori_loop(0, 24, halve, (jnp.log(1e-2), jnp.log(1e4)))
    return measure(world, jnp.exp((low + high) / 2) * unit)["reward"]
