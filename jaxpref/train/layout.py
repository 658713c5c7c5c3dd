"""The layout of a run's batches on its mesh, and the order of its pairs."""

import jax

from jaxpref import data
from jaxpref.runtime.mesh import check_rows, row_shards, share_of_rows


def make_layout(
    splits: data.Splits,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    accumulation: int,
    row_length: int | None,
) -> data.Layout:
    """The layout of all batches of a run.

    Args:
      splits: the run's data.
      mesh: the devices that share the rows.
      batch_size: pairs of a step.
      accumulation: micro-batches of a step.
      row_length: tokens of a packed row, or None for one pair a row.

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
        *datasets, row_length=row_length, shards=row_shards(mesh), **common
    )


def make_order(
    dataset: data.PreferenceDataset, *, seed: int, empty_share: float | None
) -> data.Order:
    """The order of the training pairs; `empty_share` where a run mixes traces."""
    if empty_share is None:
        return data.uniform(dataset, seed)
    return data.mixture(dataset, seed, empty_share)


def padding_advice(layout: data.Layout, dataset: data.PreferenceDataset) -> str | None:
    """One line on what padding costs; None where it is little."""
    overhead = layout.overhead(dataset)
    if overhead < 1.3:
        return None
    return (
        f"padding overhead {overhead:.1f}x (prompts are repeated per answer); "
        "--row-length auto would avoid most of it"
    )
