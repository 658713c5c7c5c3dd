"""Progress reports from a process to its supervisor.

The supervisor gives each process the path of a file in `JAXPREF_PROGRESS`.  Every write
to it counts as progress.  If the writes stop, the supervisor prints the last text.
Nothing here imports jax, because the supervisor uses this module too.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIABLE = "JAXPREF_PROGRESS"
SAVED = ".saved"
"""Suffix of the file that marks a completed checkpoint."""

_file: str | None = None


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Enables `beat` in the context; outside, the supervisor expects no progress."""
    global _file
    _file = os.environ.get(VARIABLE)
    beat("the start")
    try:
        yield
    finally:
        if _file is not None:
            with contextlib.suppress(OSError):
                os.remove(_file)
        _file = None


def beat(what: str) -> None:
    """Reports progress: `what` was just completed, for example "step 12"."""
    _write("", what)


def mark_saved(step: int) -> None:
    """Reports that the checkpoint of a step is complete: a restart resumes from it."""
    _write(SAVED, str(step))


def _write(suffix: str, text: str) -> None:
    if _file is not None:
        with contextlib.suppress(OSError), open(_file + suffix, "w") as file:
            file.write(text)


class Monitor:
    """The supervisor's side: finds processes that have stopped making progress."""

    def __init__(self, folder: Path, patience: float):
        """Starts monitoring.

        Args:
          folder: process i reports its progress in the file `i` of this folder.
          patience: seconds without progress that are allowed; 0 for no limit.
        """
        self._folder, self._patience = folder, patience
        # Process -> (time stamp of its file, when we first saw that time stamp).
        self._seen: dict[int, tuple[int | None, float]] = {}

    def silent(self, running: Sequence[int]) -> tuple[int, str] | None:
        """The process that stopped making progress first, and a message about it.

        None if no process was silent for too long.  A process outside `reporting` may
        be silent: it has not begun to train, or has finished.

        Args:
          running: indices of the processes to check.
        """
        now, silent = time.monotonic(), []
        for index in running:
            written = self._written(index)
            # Measured by our own clock: that of the file system may differ.
            if self._seen.get(index, (None,))[0] != written:
                self._seen[index] = written, now
            since = self._seen.setdefault(index, (written, now))[1]
            if written is not None and now - since > self._patience:
                silent.append((written, index))
        if not silent or not self._patience:
            return None
        reports = [(i, self._last_report(i)) for _, i in sorted(silent)]
        (first, last), *others = reports
        # The others wait for the one that stopped first.
        also = "".join(f"; process {i}: {what}" for i, what in others)
        return first, f"made no progress for {self._patience:g} s, last: {last}{also}"

    def _written(self, index: int) -> int | None:
        try:
            return (self._folder / str(index)).stat().st_mtime_ns
        except OSError:
            return None

    def _last_report(self, index: int) -> str:
        try:
            return (self._folder / str(index)).read_text()
        except OSError:
            return "nothing"
