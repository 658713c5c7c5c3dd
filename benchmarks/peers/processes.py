"""How long a command takes, and how much memory it and its children hold; Linux."""

import contextlib
import dataclasses
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

SAMPLE_SECONDS = 0.05
"""Between two looks at the memory."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a command took, with its children."""

    code: int
    """Exit code; negative: the signal that ended it."""
    seconds: float
    """Of the wall clock."""
    cpu_seconds: float
    """Of all cores, user and system; hardly more on a busy machine than on a quiet one.
    """
    peak_mib: float
    """Most resident memory of all processes together, sampled."""


def measured(
    command: Sequence[str], environ: Mapping[str, str], log: IO[str]
) -> Measured:
    """Runs a command to its end; what it prints goes to `log`."""
    started, before, peak = time.perf_counter(), _cpu_seconds(), 0.0
    # A session of its own: that is how its children are found.
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
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident_mib(session: int) -> float:
    """Resident memory of all processes of a session, at least the peak of any of them.

    Pages that processes share count for each of them.
    """
    resident, highest = 0, 0
    for status in statuses(session):
        resident += status.get("VmRSS", 0)
        highest = max(highest, status.get("VmHWM", 0))
    return max(resident, highest) / 1024


def statuses(session: int) -> Iterator[dict[str, int]]:
    """Numbers of /proc/PID/status, in KiB, of the processes of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end between two looks.
        with contextlib.suppress(OSError):
            # The name in parentheses may hold spaces; the session is the fourth after.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                lines = (folder / "status").read_text().splitlines()
                pairs = [line.split(":", 1) for line in lines if line.endswith(" kB")]
                yield {name: int(value.split()[0]) for name, value in pairs}
