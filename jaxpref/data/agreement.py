"""Checks that all processes of a run computed a step from the same data."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpref.data.feed import Stream
from jaxpref.data.splits import Splits
from jaxpref.errors import InputError
from jaxpref.runtime.processes import assert_equal_across_processes


def check_batch_agreement(
    step: int,
    splits: Splits,
    stream: Stream,
    seen: np.ndarray | None,
    *,
    make_batches: Callable[[], Any],
) -> None:
    """Compares the batch of the last step across processes, and with the pairs used.

    Each process makes the whole batch from its own records and its own position in the
    data.  Batches that are sampled from the parameters cannot be made again: only the
    records and the positions are compared, with the answers that these hold.

    Args:
      step: number of steps done; the batch of the last one is checked.
      splits: the pairs of the run.
      stream: the source of this process's batches.
      seen: int [A, R, S]; the pairs that the step was computed from.
      make_batches: makes the batches with the rows of all processes.

    Raises:
      InputError: if a process differs; the message names it, as that of
        `assert_equal_across_processes`.  Also if the step was computed from pairs
        other than those that the processes draw for it.
    """
    if seen is None:
        return
    same = {
        "the pairs": splits.digest,
        "the position in the data": stream.get_state(),
    }
    before = stream.state_before()
    if before is None:
        assert_equal_across_processes(f"step {step}", same)
        return
    batches = make_batches()
    batches.set_state(before)
    drawn = next(batches).pair_index
    if hasattr(batches, "close"):
        batches.close()
    same["the batch"] = [str(splits.train.ids[i]) for i in drawn.ravel() if i >= 0]
    assert_equal_across_processes(f"step {step}", same)
    # The mesh decides which rows of a micro-batch hold a process's pairs.
    in_order = lambda indices: np.sort(indices.reshape(len(indices), -1))
    if not np.array_equal(in_order(drawn), in_order(seen)):
        raise InputError(
            f"step {step}: it was not computed from the pairs that all processes draw "
            "for it; start them again to resume from the last checkpoint"
        )
