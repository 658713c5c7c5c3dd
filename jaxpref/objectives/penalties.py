"""Terms of the loss that depend on what the model itself computes, not on the pairs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.objectives.objective import Objective, Penalty
from jaxpref.scoring.scores import ROUTER


def router_balance(
    choices: Float[Array, " E"], probabilities: Float[Array, " E"], tokens: Array
) -> Float[Array, ""]:
    """The load-balancing loss of routers, as `transformers` computes it.

        loss = E sum_e f_e P_e

    with f_e the share of tokens for which expert e is among the k chosen ones, and P_e
    its mean probability, both over the tokens of all layers.  It is k if both are
    uniform.  f has no gradient.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6, where k is 1 and each layer
    has a loss of its own; `load_balancing_loss_func` of `transformers`.

    Args:
      choices: see `models.experts.RouterSums`.
      probabilities: the same.
      tokens: the same; > 0.
    """
    tokens = jnp.maximum(tokens, 1)
    return len(choices) * jnp.sum(choices / tokens * probabilities / tokens)


def with_router_balance(objective: Objective, coefficient: float) -> Objective:
    """The objective with `coefficient` times the routers' `router_balance` added.

    The loss is that of all tokens of the global batch; of two models, the sum of both.
    The objective itself if the coefficient is 0.
    """
    if not coefficient:
        return objective

    def value(totals: Mapping[str, Any]) -> Array:
        models = [totals] if objective.num_models == 1 else totals.values()
        return jnp.sum(jnp.stack([router_balance(*of[ROUTER]) for of in models]))

    penalty = Penalty("router_balance", (ROUTER,), coefficient, value)
    return dataclasses.replace(objective, penalties=(*objective.penalties, penalty))
