"""The arrays of a run as shapes alone: what a step takes, without weights or data."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpref import data
from jaxpref.data.batch import PreferenceBatch
from jaxpref.objectives.objective import Objective
from jaxpref.runtime.mesh import check_rows, on_devices, row_shards
from jaxpref.sharding import ROWS


def abstract_batch(
    objective: Objective,
    mesh: jax.sharding.Mesh,
    *,
    prompt_length: int,
    answer_length: int,
    batch_size: int,
    accumulation: int = 1,
    row_length: int | None = None,
) -> PreferenceBatch:
    """The shapes of a batch of pairs that are all alike, placed on the mesh.

    Args:
      objective: what the run minimizes; it says which arrays a batch has.
      mesh: the devices.
      prompt_length: tokens of each prompt.
      answer_length: tokens of each answer.
      batch_size: pairs of a step.
      accumulation: micro-batches of a step.
      row_length: tokens of a packed row, None for one pair a row.

    Returns:
      A batch of `jax.ShapeDtypeStruct`s.

    Raises:
      InputError: if the rows cannot be split over micro-batches and devices, or a pair
        is longer than a row.
    """
    builder = data.DatasetBuilder(objective.sides)
    builder.add(
        np.zeros(prompt_length, np.int32),
        [np.zeros(answer_length, np.int32)] * objective.sides,
        id="",
    )
    pair = builder.build()
    common = {"batch_size": batch_size, "accumulation": accumulation}
    if row_length is None:
        check_rows(batch_size, accumulation, mesh)
        layout = data.padded_layout(pair, **common)
    else:
        layout = data.packed_layout(
            pair,
            order=data.in_order(pair),
            row_length=row_length,
            num_steps=1,
            shards=row_shards(mesh),
            **common,
        )
    batch = layout.abstract_batch(
        labels=sorted(objective.labels), reference=sorted(objective.stored)
    )
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
    )


def abstract_state(
    new_params: Callable, new_state: Callable, mesh: jax.sharding.Mesh
) -> tuple:
    """Parameters and training state as shapes in their layouts on the mesh that is set.

    Args:
      new_params: parameters of a key, as `Model.init`.
      new_state: the state of parameters, as `init_state` with its arguments bound.
      mesh: the devices.

    Returns:
      Two pytrees of `jax.ShapeDtypeStruct`s: parameters, state.
    """
    # The key too: the mesh may have no device on which to make one.
    params = jax.eval_shape(lambda: new_params(jax.random.key(0)))
    return on_devices(params, mesh), on_devices(jax.eval_shape(new_state, params), mesh)
