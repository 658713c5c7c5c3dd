"""What a process has done last, told to a supervisor that looks whether it goes on.

The supervisor names a file for each of its processes in `JAXPREF_PROGRESS`.  Whatever
is written there is progress, and what it says is told to people if none comes any more.
Nothing here imports jax: the supervisor reads what this module writes.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIABLE = "JAXPREF_PROGRESS"
SAVED = ".saved"
"""Ends the name of the file beside it that is there once a checkpoint is complete."""

_file: str | None = None


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Within, `beat` reports; outside, the supervisor expects nothing."""
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
    """Says that `what` is done, as "step 12"."""
    _write("", what)


def mark_saved(step: int) -> None:
    """Says that the checkpoint of a step is complete: a restart goes on from there."""
    _write(SAVED, str(step))


def _write(suffix: str, text: str) -> None:
    if _file is not None:
        with contextlib.suppress(OSError), open(_file + suffix, "w") as file:
            file.write(text)


class Monitor:
    """The supervisor's side: who has told of nothing for too long."""

    def __init__(self, folder: Path, patience: float):
        """Begins to listen.

        Args:
          folder: process i tells its progress in the file `i` of it.
          patience: seconds; 0 is for ever.
        """
        self._folder, self._patience = folder, patience
        self._heard: dict[int, tuple[int | None, float]] = {}

    def silent(self, running: Sequence[int]) -> tuple[int, str] | None:
        """Whoever was silent longest, if for too long, and what is to be said of it.

        Who is not `watched`, because it has not begun or has finished, may be silent.

        Args:
          running: the processes to look at.
        """
        now, silent = time.monotonic(), []
        for index in running:
            written = self._written(index)
            # Our own clock: that of a file system may be another.
            if self._heard.get(index, (None,))[0] != written:
                self._heard[index] = written, now
            since = self._heard.setdefault(index, (written, now))[1]
            if written is not None and now - since > self._patience:
                silent.append((written, index))
        if not silent or not self._patience:
            return None
        told = [(i, self._told(i)) for _, i in sorted(silent)]
        (first, last), *others = told
        # The others wait for the one that stopped first.
        also = "".join(f"; process {i}: {what}" for i, what in others)
        return first, f"told of nothing for {self._patience:g} s, last: {last}{also}"

    def _written(self, index: int) -> int | None:
        try:
            return (self._folder / str(index)).stat().st_mtime_ns
        except OSError:
            return None

    def _told(self, index: int) -> str:
        try:
            return (self._folder / str(index)).read_text()
        except OSError:
            return "nothing"
