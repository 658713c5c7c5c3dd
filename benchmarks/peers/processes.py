"""How long a command takes, and the memory of it and its children, on Linux."""

import contextlib
import dataclasses
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

SAMPLE_SECONDS = 0.05
"""Seconds between two samples of the memory."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Time and memory of a command and its children."""

    code: int
    """Exit code; if negative, minus the signal that ended it."""
    seconds: float
    """Wall-clock time."""
    cpu_seconds: float
    """CPU time, user and system, which hardly depends on other load.
    """
    peak_mib: float
    """Peak resident memory of all processes together, sampled."""


def measured(
    command: Sequence[str], environ: Mapping[str, str], log: IO[str]
) -> Measured:
    """Runs a command until it ends; its output goes to `log`."""
    started, before, peak = time.perf_counter(), _cpu_seconds(), 0.0
    # In its own session, by which its children are found.
    process = subprocess.Popen(
        command, env=environ, stdout=log, stderr=log, start_new_session=True
    )
    try:
        while process.poll() is None:
            peak = max(peak, resident_mib(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
    return Measured(process.returncode, seconds, _cpu_seconds() - before, peak)


def _cpu_seconds() -> float:
    """CPU seconds of all children that have ended, and of their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident_mib(session: int) -> float:
    """Resident memory of all processes of a session, at least the peak of each.

    Shared pages count once for each process.
    """
    resident, highest = 0, 0
    for status in statuses(session):
        resident += status.get("VmRSS", 0)
        highest = max(highest, status.get("VmHWM", 0))
    return max(resident, highest) / 1024


def statuses(session: int) -> Iterator[dict[str, int]]:
    """The sizes in /proc/PID/status, in KiB, of each process of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end in the meantime.
        with contextlib.suppress(OSError):
            # The name in parentheses may contain spaces; the session is 4 fields later.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                lines = (folder / "status").read_text().splitlines()
                pairs = [line.split(":", 1) for line in lines if line.endswith(" kB")]
                yield {name: int(value.split()[0]) for name, value in pairs}
