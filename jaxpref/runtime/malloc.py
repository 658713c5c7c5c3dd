"""The C heap of a process that computes on its CPU."""

import ctypes
import os
import sys
from pathlib import Path

ACCELERATORS = ("nvidiactl", "kfd", "accel0", "vfio/0")
"""What Linux calls the devices of Nvidia, AMD and Google below /dev."""
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def reuse_freed_memory() -> None:
    """Makes glibc keep freed memory, where XLA computes on the CPU.

    XLA asks for the arrays of each program anew, and glibc gives large ones straight
    back to Linux, which then has to clear every page again when it is touched.  One
    heap that never shrinks does without; its peak may be higher, since little arrays
    settle in the gaps.

    To be called before XLA starts its threads, which choose a heap then.  Does nothing
    beside an accelerator, without glibc, or where a `MALLOC_` variable of the
    environment says how it is to be (`MALLOC_ARENA_MAX=8` leaves glibc as it is).
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
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
