"""What the processes of a run must have in common, compared between them."""

import collections
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.data import Plan
from jaxpref.errors import InputError
from jaxpref.train.feed import Feed


def agree(when: str, values: Mapping[str, Any]) -> None:
    """Compares values of all processes; to be called by all of them, at one place.

    Args:
      when: for the message: "step 100".
      values: by name; bytes, or what JSON can write.  The names are the same ones in
        all processes.

    Raises:
      InputError: in every process, naming one that differs from most (of two, from the
        first), and what it differs in.
    """
    if jax.process_count() == 1:
        return
    mine = np.stack([_digest(value) for value in values.values()])
    found = np.asarray(multihost_utils.process_allgather(mine))
    ((usual, _),) = collections.Counter(x.tobytes() for x in found).most_common(1)
    like = next(i for i, x in enumerate(found) if x.tobytes() == usual)
    for index, others in enumerate(found):
        differs = (others != found[like]).any(axis=-1)
        if differs.any():
            names = [name for name, is_so in zip(values, differs) if is_so]
            raise InputError(
                f"{when}: process {index} differs from process {like} in "
                f"{', '.join(names)}; start all processes with the same command, code "
                "and files, and they go on from the last checkpoint"
            )


def agree_on_batch(
    step: int, make_whole: Callable[[], Any], plan: Plan, feed: Feed, seen: np.ndarray
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
      InputError: naming the process that differs, as `agree`; or the batch holds other
        pairs than all of them would draw.
    """
    if jax.process_count() == 1 or seen is None:
        return
    batches = make_whole()
    batches.set_state(feed.state_before())
    drawn = next(batches).pairs
    if hasattr(batches, "close"):
        batches.close()
    agree(
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


def not_so(here: bool) -> list[int]:
    """The processes in which `here` is False; to be called by all of them."""
    if jax.process_count() == 1:
        return [] if here else [0]
    found = multihost_utils.process_allgather(np.int32(here))
    return [int(i) for i in np.flatnonzero(np.asarray(found) == 0)]


def of_the_first(numbers: Sequence[int], *, room: int = 64) -> list[int]:
    """The first process's numbers, at most `room` of them, each >= 0."""
    numbers = list(numbers)[:room]
    if jax.process_count() == 1:
        return numbers
    mine = np.full(room, -1, np.int32)
    mine[: len(numbers)] = numbers
    found = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    return [int(number) for number in found if number >= 0]


def _digest(value: Any) -> np.ndarray:
    """uint32 [4]; the first half of its SHA-256."""
    data = value
    if not isinstance(value, bytes):
        data = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint32)
