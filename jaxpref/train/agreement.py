"""What decides on a step, compared between the processes of a run."""

import jax
import numpy as np

from jaxpref.errors import InputError
from jaxpref.runtime.processes import assert_equal_across_processes
from jaxpref.train.feed import Stream
from jaxpref.train.task import Task


def check_batch_agreement(
    step: int, task: Task, stream: Stream, seen: np.ndarray | None
) -> None:
    """Compares between processes the batch of a step, and with what was computed.

    Each makes the whole batch from its own records and its own place in the data.

    Args:
      step: the steps done; the batch is that of the last one.
      task: the run's.
      stream: where this process's batches come from.
      seen: int [A, R, S]; the pairs that the step was computed from.

    Raises:
      InputError: naming the process that differs, as `assert_equal_across_processes`;
        or if the step was computed from other pairs than all of them would draw.
    """
    if jax.process_count() == 1 or seen is None:
        return
    splits = task.datasets.splits
    batches = task.batches(whole=True)
    batches.set_state(stream.state_before())
    drawn = next(batches).pairs
    if hasattr(batches, "close"):
        batches.close()
    assert_equal_across_processes(
        f"step {step}",
        {
            "the pairs": splits.digest,
            "the place in the data": stream.get_state(),
            "the batch": [str(splits.train.ids[i]) for i in drawn.ravel() if i >= 0],
        },
    )
    # The mesh decides in which rows of a micro-batch a process's pairs are.
    in_order = lambda indices: np.sort(indices.reshape(len(indices), -1))
    if not np.array_equal(in_order(drawn), in_order(seen)):
        raise InputError(
            f"step {step}: computed from other pairs than those that all processes "
            "draw for it; start them again, and they resume from the last checkpoint"
        )
