"""Small reward models of reviews, with a hidden layer, and pairs with wrong labels.

    r(x, y) = relu(f(x, y) W + b) . w

The features f are those of `leaderboard_world.py`, in which the gold reward is linear.
The hidden layer has more parameters than there are pairs, so that a model that sees
each pair many times can memorize wrong labels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import leaderboard_world as worlds
from experiments.leaderboard_methods import blank_batch
from experiments.log_linear import one_pass
from jaxpref.data import PreferenceBatch
from jaxpref.objectives import Objective
from jaxpref.scoring.scores import Scored

WIDTH = 64
"""Units of the hidden layer."""


def new_model(features: int, key: jax.Array) -> dict[str, jax.Array]:
    """Random parameters."""
    of_hidden, of_head = jax.random.split(key)
    return {
        "hidden": jax.random.normal(of_hidden, (features, WIDTH)) / features**0.5,
        "bias": jnp.zeros(WIDTH),
        "head": jax.random.normal(of_head, (WIDTH,)) / WIDTH**0.5,
    }


def hidden(model: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """What the head reads of each answer, [..., `WIDTH`]."""
    return jax.nn.relu(features @ model["hidden"] + model["bias"])


def reward(model: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """The reward of each answer, [...]."""
    return hidden(model, features) @ model["head"]


def draw_pairs(
    world: worlds.World, flip_rate: float, count: int, *, seed: int
) -> worlds.Pairs:
    """Pairs of reviews with Bradley-Terry labels, of which some are flipped."""
    noise = worlds.Noise(f"symmetric {flip_rate:.0%}", flip_rate)
    return worlds.draw_pairs(world, noise, count, seed=seed)


def shuffled(
    pairs: worlds.Pairs, *, epochs: int, batch: int, seed: int
) -> dict[str, np.ndarray]:
    """The pairs of every step, [steps, batch, ...]: each pair once in an epoch."""
    count = len(pairs.answers) // batch * batch
    rng = np.random.default_rng(seed)
    order = np.stack(
        [rng.permutation(len(pairs.answers))[:count] for _ in range(epochs)]
    )
    steps = order.reshape(-1, batch)
    return {"answers": pairs.answers[steps], "is_flipped": pairs.is_flipped[steps]}


def make_batch(records: dict[str, Any], step) -> PreferenceBatch:
    """The batch of one step; a completion is one "token", the index of its answer."""
    count = len(records["answers"])
    return dataclasses.replace(
        blank_batch(count),
        tokens=records["answers"][None, :, :, None],
        pair_index=(step * count + jnp.arange(count)).reshape(1, count, 1),
        is_flipped=records["is_flipped"].reshape(1, count, 1),
    )


def train(
    objective: Objective,
    features: np.ndarray,
    records: dict[str, np.ndarray],
    key: jax.Array,
    *,
    learning_rate: float,
) -> dict:
    """The trained model; of an objective with two models, both, as "one" and "two"."""
    table = jnp.asarray(features, jnp.float32)

    def score(model, batch: PreferenceBatch) -> dict[str, jax.Array]:
        return {"rewards": reward(model, table[batch.tokens[..., 0]])[:, None]}

    keys = dict(zip(("one", "two"), jax.random.split(key)))
    new = {name: new_model(table.shape[1], own) for name, own in keys.items()}
    if objective.num_models == 1:
        start, scores = new["one"], lambda p, batch: Scored(score(p, batch), {})
    else:
        start, totals = new, {"one": {}, "two": {}}
        scores = lambda p, batch: Scored({m: score(p[m], batch) for m in p}, totals)
    return one_pass(
        objective, scores, make_batch, records, start=start, learning_rate=learning_rate
    )


def accuracy(world: worlds.World, model: dict, answers: jax.Array) -> jax.Array:
    """The share of pairs of answers that a model ranks as the gold reward does.

    Pairs with equal gold rewards are left out.
    """
    gold = jnp.asarray(world.rewards, jnp.float32).ravel()[answers]
    rewards = reward(model, jnp.asarray(world.features, jnp.float32)[answers])
    right = (rewards[:, 0] > rewards[:, 1]) == (gold[:, 0] > gold[:, 1])
    differ = gold[:, 0] != gold[:, 1]
    return jnp.sum(right & differ) / jnp.sum(differ)
