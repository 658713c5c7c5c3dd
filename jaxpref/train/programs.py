"""What is printed of a run's batches: their shape, and what packing would save."""

from collections.abc import Sequence

from jaxpref.data import Layout, Order, PreferenceDataset, packed_layout


def describe(layout: Layout, programs: Sequence[str]) -> str:
    """One line: the shape of all batches of a run, and the programs of the model."""
    return (
        f"every batch: {layout.describe()}; programs of the model, at most: "
        f"{', '.join(programs)}"
    )


def padding_advice(
    layout: Layout,
    order: Order,
    train: PreferenceDataset,
    heldout: PreferenceDataset,
    *,
    shards: int,
) -> str | None:
    """What packed rows would save a run; None where it is little.

    Args:
      layout: of its batches.
      order: of the training pairs.
      train: the training data.
      heldout: the data it is evaluated on, which rows must hold too.
      shards: devices that share the rows of a micro-batch.
    """
    overhead = layout.overhead(train)
    if overhead < 1.3:
        return None
    size = layout.batch_size
    packed = packed_layout(train, heldout, order=order, batch_size=size, shards=shards)
    return (
        f"padding overhead {overhead:.1f}x (prompts are repeated per answer); "
        f"--row-length {packed.row_length} would reduce it to "
        f"{packed.overhead(train):.2f}x"
    )
