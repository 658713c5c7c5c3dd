"""Handling of SIGTERM during training: the last step is saved before the run ends."""

import contextlib
import ctypes
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = 128 + signal.SIGTERM
"""Exit code (143) of a run that got SIGTERM and saved its last step."""
SAME_NOTICE = 5.0
"""Seconds in which another SIGTERM counts as the same notice.  A machine that is shut
down signals every process, and the supervisor forwards its own signal as well."""


class Preempted(Exception):
    """The run ends because of SIGTERM; the same command resumes it."""

    def __init__(self, step: int, saved: bool = True):
        """Builds the message.

        Args:
          step: the last step.
          saved: whether it was saved.  A bad step is not saved (`guard`).
        """
        done = f"saved step {step}" if saved else f"step {step} is bad, not saved"
        super().__init__(f"preempted: {done}; the same command resumes")
        self.step = step


@contextlib.contextmanager
def watched(start: int) -> Iterator[Callable[[int], bool]]:
    """Inside the context, a SIGTERM is recorded instead of ending the process.

    A SIGTERM more than `SAME_NOTICE` seconds after the first one interrupts, as Ctrl-C
    does.  Outside the main thread, where Python cannot set handlers, nothing is
    recorded.

    Several processes agree on a step by `reached_preemption_sync_point`, whichever of
    them got the signal.  It is the step after the latest one that any of them has asked
    about.  JAX checks for the signal once per second.

    Args:
      start: number of steps completed so far.

    Yields:
      `should_stop(step)`: whether to save and end now.  All processes must call it
      after each step, with the number of steps completed.
    """
    several = jax.process_count() > 1
    notify_others = jax_handler() if several else lambda number: None
    first: float | None = None

    def record(number, frame):
        nonlocal first
        if first is None:
            first = time.monotonic()
            if notify_others is not None:
                notify_others(number)
        elif time.monotonic() - first > SAME_NOTICE:
            signal.default_int_handler(number, frame)

    def should_stop(step: int) -> bool:
        if several:
            return multihost_utils.reached_preemption_sync_point(step)
        return first is not None

    # JAX must know the current step: otherwise a SIGTERM during the first step would
    # make the processes agree on a step that is long past.
    should_stop(start)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or notify_others is None:
        yield should_stop
        return
    before = signal.signal(signal.SIGTERM, record)
    try:
        yield should_stop
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@functools.cache
def jax_handler() -> Callable[[int], None] | None:
    """The SIGTERM handler of jax.distributed, which notifies the other processes.

    It is a C++ handler that Python's `signal` can neither read nor restore, so it must
    be fetched before another handler replaces it.  The result is cached.  None if
    jax.distributed was not started, or if a Python handler was installed first.
    """
    installed_by_python = callable(signal.getsignal(signal.SIGTERM))
    if installed_by_python or not jax.distributed.is_initialized():
        return None
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    # Setting a handler returns the previous one; put it back at once.
    address = libc.signal(signal.SIGTERM, None)
    libc.signal(signal.SIGTERM, address)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address else None
