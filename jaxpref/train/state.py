"""The training state: everything a step changes, and nothing else."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpref.objectives.objective import Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces; checkpoints add the data position."""

    step: jax.Array
    """int32 []; optimizer steps attempted, equal to the batches consumed."""
    skipped: jax.Array
    """int32 []; how many of them were skipped because a value was not finite."""
    params: Any
    """The model's parameters, sharded from initialization on."""
    opt_state: Any
    """optax's state."""
    objective_state: Any
    """What the objective learns in addition to the model, e.g. reliabilities."""
    reference: Any = None
    """The parameters of a reference that moves, or None."""


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    objective: Objective,
    *,
    num_annotators: int = 0,
    moving: bool = False,
) -> TrainState:
    """The state before the first step.  Pure, so `jax.eval_shape` gives shardings."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        objective_state=objective.init(num_annotators),
        reference=params if moving else None,
    )
