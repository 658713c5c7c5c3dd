"""Settings of the C heap for processes that compute on CPU."""

import ctypes
import os
import sys
from pathlib import Path

ACCELERATORS = ("nvidiactl", "kfd", "accel0", "vfio/0")
"""Names of Nvidia, AMD, and Google devices under /dev on Linux."""
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8

LARGE = 2**25
"""Bytes above which arrays do not share the heap; the most that glibc accepts."""


def reuse_freed_memory() -> None:
    """Makes glibc reuse freed memory when XLA computes on CPU.

    XLA allocates the arrays of each program again.  glibc returns their memory to Linux
    at once, which must then zero every page when it is touched again.  A single heap
    that never shrinks avoids this.

    Arrays above `LARGE` are returned nevertheless.  In the heap, the block that one of
    them leaves is rarely of use for the next, and a process would need several times
    the memory that its arrays have at any time.

    Must be called before XLA starts its threads, which choose their heaps at the start.
    Does nothing if there is an accelerator, if the C library is not glibc, or if a
    `MALLOC_` environment variable is set (`MALLOC_ARENA_MAX=8` is glibc's default).
    """
    if not sys.platform.startswith("linux"):
        return
    if any((Path("/dev") / name).exists() for name in ACCELERATORS):
        return
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, LARGE)
    mallopt(M_TRIM_THRESHOLD, -1)
