"""How long each phase of a run takes: `OUT/timings.json`, in seconds."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxpref.files import write_json

COMPILE_EVENTS = ("backend_compile_duration", "jaxpr_to_mlir_module_duration")
"""Suffixes of JAX's event names: lowering a program, and compiling it or reading it
from the cache on disk.  Tracing events are nested, so tracing counts toward its phase.
"""


class Timings:
    """Wall-clock seconds since the process started, by phase; phases do not overlap.

    Usage:

        with timings() as passed:
            ...
            passed.mark("tokenize")  # everything since the previous mark
            ...
            passed.mark("steps")
            passed.write(out / "timings.json")
    """

    def __init__(self, began: float):
        """Starts at `began`, a value of `time.time()`."""
        self._since = began
        self._compiled = 0.0
        self._thread = threading.get_ident()
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Adds the time since the last mark to `phase`, without compilation.

        A phase may be marked several times.
        """
        now = time.time()
        compiled, self._compiled = self._compiled, 0.0
        passed = max(now - self._since - compiled, 0.0)
        self._since = now
        for name, seconds in ((phase, passed), ("compile", compiled)):
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def write(self, path: Path) -> None:
        """Writes the seconds by phase.

        Raises:
          InputError: if the file cannot be written.
        """
        write_json(path, {name: round(s, 3) for name, s in self.seconds.items()})

    def count_compilation(
        self, event: str, duration_secs: float, **_: str | int
    ) -> None:
        """A listener for JAX's durations; ignores compilation in other threads."""
        here = threading.get_ident() == self._thread
        if here and event.endswith(COMPILE_EVENTS):
            self._compiled += duration_secs


@contextlib.contextmanager
def timings(began: float | None = None) -> Iterator[Timings]:
    """Timings since `began`; counts compilation within the block.

    Args:
      began: a value of `time.time()`; the start of this process if None.
    """
    found = Timings(process_start() if began is None else began)
    jax.monitoring.register_event_duration_secs_listener(found.count_compilation)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(found.count_compilation)


def process_start() -> float:
    """The `time.time()` at which this process started; the current one if unknown."""
    try:
        # The name in parentheses may contain spaces; the start is 20 fields later.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
