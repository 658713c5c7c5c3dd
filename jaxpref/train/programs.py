"""What is printed of a run's batches: their shape, and what packing would save."""

from collections.abc import Sequence

from jaxpref.data import Layout, PreferenceDataset, packed_layout
from jaxpref.errors import InputError


def describe(layout: Layout, programs: Sequence[str]) -> str:
    """One line: the shape of all batches of a run, and the programs of the model."""
    return (
        f"every batch: {layout.describe()}; programs of the model, at most: "
        f"{', '.join(programs)}"
    )


def padding_advice(
    layout: Layout,
    dataset: PreferenceDataset,
    heldout: PreferenceDataset,
    *,
    shards: int,
) -> str | None:
    """What packed rows would save a run with one pair a row; None where it is little.

    Args:
      layout: of its batches.
      dataset: the training data.
      heldout: the data it is evaluated on, which rows must hold too.
      shards: parts the rows of a step are split into, devices times micro-batches.
    """
    overhead = layout.overhead(dataset)
    if overhead < 1.3:
        return None
    tokens = dataset.packed_lengths
    longest = max(int(x.packed_lengths.max(initial=0)) for x in (dataset, heldout))
    row = max(longest, int(layout.batch_size / shards * tokens.mean()))
    row = -(-row // 64) * 64
    advice = (
        f"padding overhead {overhead:.1f}x (prompts are repeated per answer); "
        f"--row-length {row} would reduce it"
    )
    try:
        packed_layout(
            dataset,
            heldout,
            row_length=row,
            batch_size=layout.batch_size,
            shards=shards,
        )
    except InputError:
        return advice + ", in larger batches than these"
    return advice + " to about 1.05x"
