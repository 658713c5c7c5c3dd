"""The layout of a run's batches, chosen from its data and devices."""

from typing import Literal

from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.layouts import Layout, packed_layout, padded_layout
from jaxpref.data.samplers import Order
from jaxpref.data.splits import Splits
from jaxpref.errors import InputError

TOKENS_PER_DEVICE = 8_192
"""Tokens of a packed micro-batch that are enough to keep a device busy."""
WORTHWHILE = 1.3
"""How many times fewer tokens packing must compute for a run to suggest it."""


def make_layout(
    splits: Splits,
    order: Order,
    *,
    sizes_for: Order | None = None,
    shards: int,
    share: tuple[int, int],
    batch_size: int,
    accumulation: int,
    row_length: int | Literal["auto"] | None,
    num_steps: int,
) -> Layout:
    """The layout of all batches of a run.

    Args:
      splits: the run's data.
      order: the order of its training pairs.
      sizes_for: the order for which packed rows are chosen; see `packed_layout`.
      shards: devices that share the rows of a micro-batch.
      share: index and number of the processes' shares of the rows.
      batch_size: pairs per step.
      accumulation: micro-batches per step; with packed rows, the minimum.
      row_length: tokens of a packed row, "auto" to choose it from the data, or None for
        one pair per row.
      num_steps: steps of the run.

    Raises:
      InputError: if there are fewer pairs than in a batch.
    """
    if batch_size > len(splits.train):
        raise InputError(
            f"batch_size {batch_size}: a step would see pairs twice, since there "
            f"are only {len(splits.train)} to train on; use a smaller --batch-size"
        )
    index, count = share
    common = {
        "batch_size": batch_size,
        "accumulation": accumulation,
        "process_index": index,
        "process_count": count,
    }
    datasets = (splits.train, splits.heldout)
    if row_length is None:
        return padded_layout(*datasets, **common)
    return packed_layout(
        *datasets,
        order=order,
        sizes_for=sizes_for,
        row_length=row_length,
        num_steps=num_steps,
        shards=shards,
        tokens_per_device=TOKENS_PER_DEVICE if row_length == "auto" else 0,
        **common,
    )


def padding_advice(
    layout: Layout,
    order: Order,
    train: PreferenceDataset,
    heldout: PreferenceDataset,
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
    if overhead < WORTHWHILE:  # packing, which takes time to simulate, has at least 1
        return None
    size = layout.batch_size
    packed = packed_layout(train, heldout, order=order, batch_size=size, shards=shards)
    packed_overhead = packed.overhead(train)
    if overhead < WORTHWHILE * packed_overhead:
        return None
    return (
        f"padding overhead {overhead:.1f}x (prompts are repeated per answer); "
        f"--row-length {packed.row_length} would reduce it to {packed_overhead:.2f}x"
    )
