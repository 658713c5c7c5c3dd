"""What decides on a step, compared between the processes of a run."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.data import Splits
from jaxpref.errors import InputError
from jaxpref.runtime.processes import assert_equal_across_processes
from jaxpref.train.feed import Feed


def agree_on_batch(
    step: int, make_whole: Callable[[], Any], plan: Splits, feed: Feed, seen: np.ndarray
) -> None:
    """Compares what the processes know of a step's batch, and that with what it was.

    Each makes the whole batch from its own pairs and its own place in the data.

    Args:
      step: the steps done; the batch is that of the last one.
      make_whole: makes an iterator over the batches of all processes.
      plan: this process's pairs.
      feed: where its own batches come from.
      seen: int [A, R, S]; the pairs that the step was computed of.

    Raises:
      InputError: naming the process that differs, as
        `assert_equal_across_processes`; or the batch holds other
        pairs than all of them would draw.
    """
    if jax.process_count() == 1 or seen is None:
        return
    batches = make_whole()
    batches.set_state(feed.state_before())
    drawn = next(batches).pairs
    if hasattr(batches, "close"):
        batches.close()
    assert_equal_across_processes(
        f"step {step}",
        {
            "the pairs": plan.digest,
            "the place in the data": feed.get_state(),
            "the batch": [str(plan.train.ids[i]) for i in drawn.ravel() if i >= 0],
        },
    )
    # The mesh decides in which rows of a micro-batch a process's pairs lie.
    in_order = lambda indices: np.sort(indices.reshape(len(indices), -1))
    if not np.array_equal(in_order(drawn), in_order(seen)):
        raise InputError(
            f"step {step}: computed of other pairs than those that all processes draw "
            "for it; start them again, and they go on from the last checkpoint"
        )


def versions() -> dict[str, str]:
    """What decides, beside options and data, on what a process computes."""
    code = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    found = {"jaxpref's code": code.hexdigest(), "Python": f"{sys.version_info[:2]}"}
    for name in ("jax", "jaxlib", "numpy", "grain"):
        found[name] = importlib.metadata.version(name)
    return found
