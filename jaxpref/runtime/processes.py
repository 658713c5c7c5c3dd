"""The processes of a run: what only one does, and what all must have in common."""

import collections
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.errors import InputError


def only_first_process(function: Callable, *args: Any, **kwargs: Any) -> None:
    """Calls `function(*args, **kwargs)` on process 0 and does nothing on the others."""
    if jax.process_index() == 0:
        function(*args, **kwargs)


def log(message: str) -> None:
    """Prints one line of the run's output, on process 0."""
    only_first_process(print, message, flush=True)


def broadcast_from_process_zero(value: Any) -> np.ndarray:
    """Process 0's array, on every process; the others give one of its shape and dtype.

    To be called by all processes, at one place.
    """
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value
    return np.array(multihost_utils.broadcast_one_to_all(value))


def failing_processes(succeeded: bool) -> list[int]:
    """The processes on which `succeeded` is False; to be called by all of them."""
    if jax.process_count() == 1:
        return [] if succeeded else [0]
    found = multihost_utils.process_allgather(np.int32(succeeded))
    return [int(i) for i in np.flatnonzero(np.asarray(found) == 0)]


def assert_equal_across_processes(when: str, values: Mapping[str, Any]) -> None:
    """Compares values between processes; to be called by all of them, at one place.

    Args:
      when: for the message: "step 100".
      values: by name; bytes, or anything JSON can write.  All processes give the same
        names.

    Raises:
      InputError: on every process, naming one that differs from the majority (of two,
        from the first) and the values that differ.
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
                "and files, and they resume from the last checkpoint"
            )


def _digest(value: Any) -> np.ndarray:
    """The first half of a value's SHA-256, uint32 [4]."""
    data = value
    if not isinstance(value, bytes):
        data = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint32)
