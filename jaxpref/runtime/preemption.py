"""SIGTERM while it trains: the last step is saved before the run ends."""

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
"""Exit code, 143, of a run that SIGTERM ended after it had saved its last step."""
SAME_NOTICE = 5.0
"""Seconds in which another SIGTERM says nothing new: a machine that shuts down sends
one to every process, and the supervisor passes its own on."""


class Preempted(Exception):
    """The run has saved its last step and ends; the same command resumes."""

    def __init__(self, step: int, saved: bool = True):
        """Says what was done.

        Args:
          step: the last step.
          saved: whether it was saved: one that goes wrong is not (`guard`).
        """
        done = f"saved step {step}" if saved else f"step {step} goes wrong, not saved"
        super().__init__(f"preempted: {done}; the same command resumes")
        self.step = step


@contextlib.contextmanager
def watched(start: int) -> Iterator[Callable[[int], bool]]:
    """Within, a SIGTERM is noted, and the run goes on until it asks whether one came.

    A SIGTERM more than `SAME_NOTICE` seconds after the first interrupts as Ctrl-C does.
    Nothing is noted outside the main thread, where Python sets no handlers.

    Several processes agree on a step by `reached_preemption_sync_point`: the one after
    the furthest that any of them has asked about, whichever of them got the signal.
    JAX looks for it once a second.

    Args:
      start: steps done already.

    Yields:
      `noticed(step)`: whether to save and end now.  To be asked after each step, by
      all processes alike, with the number of steps done.
    """
    several = jax.process_count() > 1
    tell_others = jax_handler() if several else lambda number: None
    first = None

    def note(number, frame):
        nonlocal first
        if first is None:
            first = time.monotonic()
            tell_others(number)
        elif time.monotonic() - first > SAME_NOTICE:
            signal.default_int_handler(number, frame)

    def noticed(step: int) -> bool:
        if several:
            return multihost_utils.reached_preemption_sync_point(step)
        return first is not None

    # A notice before the first step is done must not agree on a step of long ago.
    noticed(start)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or tell_others is None:
        yield noticed
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@functools.cache
def jax_handler() -> Callable[[int], None] | None:
    """What jax.distributed does at SIGTERM: it notes the signal, and tells the others.

    It is C++ that Python's `signal` neither shows nor puts back, so it must be asked
    for before another handler takes its place; later calls return what the first did.
    None where jax.distributed was not started, or a handler of Python's came first.
    """
    installed_by_python = callable(signal.getsignal(signal.SIGTERM))
    if installed_by_python or not jax.distributed.is_initialized():
        return None
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    # Returns the handler that stood there, and for a moment none does.
    address = libc.signal(signal.SIGTERM, None)
    libc.signal(signal.SIGTERM, address)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address else None
