"""What is printed of a run's batches: their one shape, and what packing would save."""

from collections.abc import Sequence

from jaxpref.data import BatchShape, PackedShape, Pairs, packed_shape
from jaxpref.data.packing import lengths
from jaxpref.errors import InputError


def describe(
    *,
    shape: BatchShape | PackedShape,
    accumulation: int,
    programs: Sequence[str],
    batch_size: int | None = None,
    **_,
) -> str:
    """One line: the shape that all batches of a run have, and what is compiled for it.

    Args:
      shape: of its batches.
      accumulation: micro-batches of a step.
      programs: names of the programs that hold the model.
      batch_size: pairs of a step, where each has a row of its own.
    """
    packed = isinstance(shape, PackedShape)
    rows = (shape.rows if packed else batch_size) // accumulation
    sequences, slots = (1, shape.slots) if packed else (shape.sides, 1)
    return (
        f"every batch: {accumulation} x {rows} rows of {sequences} x "
        f"{shape.sequence_length} tokens, predictions {shape.predictions}, pair slots "
        f"{slots}; programs of the model, at most: {', '.join(programs)}"
    )


def padding_told(
    pairs: Pairs, heldout: Pairs, shape: BatchShape, *, batch_size: int, shards: int
) -> str | None:
    """What packed rows would save a run with one pair a row; None where it is little.

    Args:
      pairs: the training pairs.
      heldout: those that are evaluated on, which rows must hold too.
      shape: of their padded batches.
      batch_size: pairs of a step.
      shards: parts the rows of a step are split into, devices times micro-batches.
    """
    tokens, _ = lengths(pairs)
    wasted = shape.sides * shape.sequence_length * len(pairs) / tokens.sum()
    if wasted < 1.3:
        return None
    row = row_length_for(pairs, heldout, batch_size=batch_size, shards=shards)
    told = (
        f"padding, and prompts for each answer: {wasted:.1f} tokens are computed for "
        f"one that exists; --row-length {row} would pack them, "
    )
    try:
        packed_shape(
            pairs, heldout, row_length=row, batch_size=batch_size, parts=shards
        )
    except InputError:
        return told + "in larger batches than these"
    return told + "about 1.05 for one"


def row_length_for(
    pairs: Pairs, heldout: Pairs, *, batch_size: int, shards: int
) -> int:
    """Tokens of a packed row: one row per shard holds a mean batch, and any pair fits.

    Arguments as of `padding_told`.
    """
    longest = max(int(lengths(p)[0].max(initial=0)) for p in (pairs, heldout))
    row = max(longest, int(batch_size / shards * lengths(pairs)[0].mean()))
    return -(-row // 64) * 64
