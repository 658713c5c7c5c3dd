"""The layout of pairs that all have the same lengths."""

import jax
import numpy as np

from jaxpref import data
from jaxpref.runtime.mesh import check_rows, row_shards


def uniform_layout(
    num_completions: int,
    mesh: jax.sharding.Mesh,
    *,
    prompt_length: int,
    answer_length: int,
    batch_size: int,
    accumulation: int = 1,
    row_length: int | None = None,
) -> data.Layout:
    """The layout of a run whose pairs all have the same lengths.

    Args:
      num_completions: completions per prompt.
      mesh: the devices.
      prompt_length: tokens of each prompt.
      answer_length: tokens of each answer.
      batch_size: pairs per step.
      accumulation: micro-batches per step.
      row_length: tokens per packed row; None for one pair per row.

    Raises:
      InputError: if the rows cannot be split over micro-batches and devices, or a pair
        is longer than a row.
    """
    builder = data.DatasetBuilder(num_completions)
    builder.add(
        np.zeros(prompt_length, np.int32),
        [np.zeros(answer_length, np.int32)] * num_completions,
        id="",
    )
    pair = builder.build()
    if row_length is None:
        check_rows(batch_size, accumulation, mesh)
        return data.padded_layout(
            pair, batch_size=batch_size, accumulation=accumulation
        )
    return data.packed_layout(
        pair,
        order=data.in_order(pair),
        row_length=row_length,
        num_steps=1,
        shards=row_shards(mesh),
        batch_size=batch_size,
        accumulation=accumulation,
    )
