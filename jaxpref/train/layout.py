"""The layout of a run's batches, and the order of its pairs."""

from typing import Literal

import jax

from jaxpref import data
from jaxpref.runtime.mesh import check_rows, row_shards, share_of_rows

TOKENS_PER_DEVICE = 8_192
"""Tokens of a packed micro-batch that are enough to keep a device busy."""


def make_layout(
    splits: data.Splits,
    order: data.Order,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    accumulation: int,
    row_length: int | Literal["auto"] | None,
    num_steps: int,
) -> data.Layout:
    """The layout of all batches of a run.

    Args:
      splits: the run's data.
      order: the order of its training pairs.
      mesh: the devices that share the rows.
      batch_size: pairs per step.
      accumulation: micro-batches per step; with packed rows, the minimum.
      row_length: tokens of a packed row, "auto" to choose it from the data, or None for
        one pair per row.
      num_steps: steps of the run.

    Raises:
      InputError: if the devices cannot share the rows evenly.
    """
    index, count = share_of_rows(mesh)
    common = {
        "batch_size": batch_size,
        "accumulation": accumulation,
        "process_index": index,
        "process_count": count,
    }
    datasets = (splits.train, splits.heldout)
    if row_length is None:
        check_rows(batch_size, accumulation, mesh)
        return data.padded_layout(*datasets, **common)
    return data.packed_layout(
        *datasets,
        order=order,
        row_length=row_length,
        num_steps=num_steps,
        shards=row_shards(mesh),
        tokens_per_device=TOKENS_PER_DEVICE if row_length == "auto" else 0,
        **common,
    )


def make_order(
    dataset: data.PreferenceDataset, *, seed: int, empty_share: float | None
) -> data.Order:
    """The order of the training pairs; `empty_share` is None without a mixture."""
    if empty_share is None:
        return data.uniform(dataset, seed)
    return data.mixture(dataset, seed, empty_share)


def padding_advice(
    layout: data.Layout,
    order: data.Order,
    train: data.PreferenceDataset,
    heldout: data.PreferenceDataset,
    *,
    shards: int,
) -> str | None:
    """How much packing would save; None if it is little.

    Args:
      layout: the layout of the run's batches.
      order: the order of the training pairs.
      train: the training data.
      heldout: the held-out data, which must fit into the rows too.
      shards: devices that share the rows of a micro-batch.
    """
    overhead = layout.overhead(train)
    if overhead < 1.3:
        return None
    size = layout.batch_size
    packed = data.packed_layout(
        train, heldout, order=order, batch_size=size, shards=shards
    )
    return (
        f"padding overhead {overhead:.1f}x (prompts are repeated per answer); "
        f"--row-length {packed.row_length} would reduce it to "
        f"{packed.overhead(train):.2f}x"
    )
