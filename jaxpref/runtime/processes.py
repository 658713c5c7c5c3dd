"""Helpers for multi-process runs: process-0-only work, broadcasts, and comparisons."""

import collections
import concurrent.futures
import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.errors import InputError, show, visible_line

Result = TypeVar("Result")

POLLING = 1.0
"""Seconds between two questions whether process 0 is done."""
OF_USER = "InputError: "
"""Begins the messages of errors that the user can fix."""
LONGEST_TEXT = 4000
"""Bytes of a text that process 0 sends to the others."""


def share_of_processes() -> tuple[int, int]:
    """The index of this process, and the number of processes."""
    return jax.process_index(), jax.process_count()


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
      RuntimeError: on the others, if it raises anything else, which process 0 raises
        again; a supervisor restarts them, as it may process 0.
    """
    result, failure, message = None, None, ""
    if jax.process_index() == 0:
        try:
            result = function()
        except (Exception, SystemExit) as error:  # else the others would wait forever
            failure, message = error, _described(error)
    message = broadcast_text(message)
    if failure is not None:
        raise failure
    if message.startswith(OF_USER):
        raise InputError(message.removeprefix(OF_USER))
    if message:
        raise RuntimeError(f"process 0: {message}")
    return result


def _described(error: BaseException) -> str:
    """An error's message: as it is for the user, else its type and first line."""
    if isinstance(error, InputError):
        return f"{OF_USER}{error}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def numbers_from_process_zero(
    function: Callable[[], np.ndarray], count: int
) -> np.ndarray:
    """Calls `function` on process 0; all processes must call this.

    It may take long: the other processes do not wait for it in one collective, which
    would fail after half a minute on CPUs.

    Args:
      function: returns `count` numbers; called in a thread.
      count: how many, on all processes.

    Returns:
      The numbers on every process, float64 [count] and exact.

    Raises:
      InputError: as `together`.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(function if jax.process_index() == 0 else lambda: None)
        done = False
        while not done:
            concurrent.futures.wait([future], timeout=POLLING)
            done = bool(broadcast_from_process_zero(np.int32(future.done())))
        found = together(lambda: np.asarray(future.result(), np.float64))
    if not count:
        return np.zeros(0)
    # As bytes, since jax would round float64.
    sent = np.zeros(count, np.float64) if found is None else found
    return broadcast_from_process_zero(sent.view(np.uint8)).view(np.float64)


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


def gather(value: Any) -> np.ndarray:
    """The arrays of all processes, one after the other along a new first axis.

    All processes must call it with arrays of one shape and dtype.
    """
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value[None]
    return np.asarray(multihost_utils.process_allgather(value))


def processes_on_this_host() -> int:
    """How many processes of the run have this host name; all must call it."""
    names = gather(np.frombuffer(_digest(socket.gethostname()), np.int32))
    return int((names == names[jax.process_index()]).all(-1).sum())


def first_failure(place: int, reason: str) -> tuple[int, str]:
    """The lowest place at which a process failed, and its reason, on all processes.

    Args:
      place: where this process failed, or a number that is larger for all if it did
        not.
      reason: why; empty if it did not.
    """
    places = gather(np.int32(place))
    first = int(places.argmin())
    text = np.zeros(LONGEST_TEXT, np.uint8)
    encoded = np.frombuffer(reason.encode("utf-8", "replace")[:LONGEST_TEXT], np.uint8)
    text[: len(encoded)] = encoded
    found = gather(text)[first].tobytes().rstrip(b"\0")
    return int(places[first]), found.decode("utf-8", "replace")


def exchange(own: Mapping[int, Any], count: int) -> dict[int, bytes]:
    """What this process lacks of `count` blocks of bytes, from those that have it.

    Each round, every process sends one block to all others.

    Args:
      own: blocks that this process has, by number; each is on some process.
      count: how many there are.
    """
    if not count:
        return {}
    has = gather(np.array([n in own for n in range(count)], np.int32))
    rank, sender = jax.process_index(), has.argmax(0)
    lacking = ~has.all(0)  # on some process
    sent = [np.flatnonzero(lacking & (sender == p)) for p in range(len(has))]
    received: dict[int, bytes] = {}
    for turn in range(max(map(len, sent))):
        mine = own[int(sent[rank][turn])] if turn < len(sent[rank]) else b""
        sizes = gather(np.int32(len(mine)))
        # Few different sizes, since each is a program of its own.
        block = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
        block[: len(mine)] = np.frombuffer(mine, np.uint8)
        blocks = gather(block)
        for numbers, size, data in zip(sent, sizes, blocks):
            if turn < len(numbers) and int(numbers[turn]) not in own:
                received[int(numbers[turn])] = data[:size].tobytes()
    return received


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, which must call it together, in their order."""
    own = {jax.process_index(): text.encode("utf-8", "surrogatepass")}
    blocks = own | exchange(own, jax.process_count())
    return [
        blocks[n].decode("utf-8", "surrogatepass") for n in range(jax.process_count())
    ]
