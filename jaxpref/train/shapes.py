"""The arrays of a run as shapes alone: what a step takes, without weights or data."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpref import data
from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.packing import collate_packed
from jaxpref.data.pipeline import collate
from jaxpref.errors import InputError
from jaxpref.objectives.objective import Objective
from jaxpref.runtime.mesh import on_devices, row_shards
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

    Made by what makes the batches of a run, of rows without pairs: so the fields are
    the same.

    Args:
      objective: what the run makes small; it says which arrays a batch has.
      mesh: the devices.
      prompt_length: tokens of each prompt.
      answer_length: tokens of each answer.
      batch_size: pairs of a step; about as many where they are packed.
      accumulation: micro-batches of a step.
      row_length: tokens of a packed row, None for one pair a row.

    Returns:
      A batch of `jax.ShapeDtypeStruct`s.

    Raises:
      InputError: if the rows cannot be split over micro-batches and devices, or a pair
        is longer than a row.
    """
    parts = accumulation * row_shards(mesh)
    builder = data.DatasetBuilder(objective.sides)
    builder.add(
        np.zeros(prompt_length, np.int32),
        [np.zeros(answer_length, np.int32)] * objective.sides,
        id="",
        columns={name: 0.0 for name in sorted(objective.labels)},
    )
    pairs = builder.build()
    table = np.zeros((1, objective.sides), np.float32)
    reference = {name: table for name in sorted(objective.stored)}
    if row_length is None:
        if batch_size % parts:
            raise InputError(
                f"batch {batch_size} is not a multiple of accumulation {accumulation} "
                f"x {row_shards(mesh)} devices (data x fsdp)"
            )
        nobody = np.full((accumulation, batch_size // accumulation), -1)
        shape = data.batch_shape(pairs)
        batch = collate(pairs, nobody, shape=shape, reference=reference)
    else:
        shape = data.packed_shape(
            pairs, row_length=row_length, batch_size=batch_size, parts=parts
        )
        nobody = np.full((accumulation, shape.rows // accumulation, shape.slots), -1)
        batch = collate_packed(pairs, nobody, shape=shape, reference=reference)
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
