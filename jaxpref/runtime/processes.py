"""Helpers for multi-process runs: process-0-only work, broadcasts, and comparisons."""

import collections
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.errors import InputError, show, visible_line

Result = TypeVar("Result")

LONGEST_TEXT = 4000
"""Bytes of a text that process 0 sends to the others."""


def only_first_process(function: Callable, *args: Any, **kwargs: Any) -> None:
    """Calls `function(*args, **kwargs)` on process 0 and does nothing on the others."""
    if jax.process_index() == 0:
        function(*args, **kwargs)


def log(message: str) -> None:
    """Prints one line of the run's output, on process 0."""
    only_first_process(show, visible_line(message))


def broadcast_from_process_zero(value: Any) -> np.ndarray:
    """Returns process 0's array on every process.

    All processes must call it at the same point, with arrays of one shape and dtype.
    """
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value
    return np.array(multihost_utils.broadcast_one_to_all(value))


def together(function: Callable[[], Result]) -> Result | None:
    """Calls `function` on process 0; all processes must call this.

    Returns:
      Its result on process 0, None on the others.

    Raises:
      InputError: on every process, if `function` raises one.
    """
    result, message = None, ""
    if jax.process_index() == 0:
        try:
            result = function()
        except InputError as error:
            message = str(error)
    if message := broadcast_text(message):
        raise InputError(message)
    return result


def broadcast_text(text: str) -> str:
    """Returns process 0's text, up to `LONGEST_TEXT` bytes, on every process."""
    data = np.zeros(LONGEST_TEXT, np.uint8)
    encoded = np.frombuffer(text.encode("utf-8", "replace")[:LONGEST_TEXT], np.uint8)
    data[: len(encoded)] = encoded
    found = broadcast_from_process_zero(data).tobytes().rstrip(b"\0")
    return found.decode("utf-8", "replace")


def failing_processes(succeeded: bool) -> list[int]:
    """The processes on which `succeeded` is False; all processes must call it."""
    if jax.process_count() == 1:
        return [] if succeeded else [0]
    results = multihost_utils.process_allgather(np.int32(succeeded))
    return [int(i) for i in np.flatnonzero(np.asarray(results) == 0)]


def assert_equal_across_processes(when: str, values: Mapping[str, Any]) -> None:
    """Checks that values are equal on all processes, which must call it together.

    Args:
      when: prefix of the error message, for example "step 100".
      values: values by name; bytes, or anything that JSON can encode.  All processes
        must pass the same names.

    Raises:
      InputError: on every process.  The message names a process that differs from the
        majority (of two processes, from the first) and the values that differ.
    """
    if jax.process_count() == 1:
        return
    mine = np.stack([_digest(value) for value in values.values()])
    digests = np.asarray(multihost_utils.process_allgather(mine))
    ((majority, _),) = collections.Counter(x.tobytes() for x in digests).most_common(1)
    usual = next(i for i, x in enumerate(digests) if x.tobytes() == majority)
    for index, others in enumerate(digests):
        differs = (others != digests[usual]).any(axis=-1)
        if differs.any():
            names = [name for name, differing in zip(values, differs) if differing]
            raise InputError(
                f"{when}: process {index} differs from process {usual} in "
                f"{', '.join(names)}; start all processes with the same command, code "
                "and files, and they resume from the last checkpoint"
            )


def _digest(value: Any) -> np.ndarray:
    """The first half of a value's SHA-256, uint32 [4]."""
    data = value
    if not isinstance(value, bytes):
        data = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint32)
