"""The metrics of a run on disk: `metrics.jsonl` and TensorBoard."""

import contextlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax

from jaxpref.files import cannot_write, open_to_append, write_whole

_log = logging.getLogger("jaxpref")


class MetricsWriter:
    """Writes lines of metrics on process 0; does nothing on the others.

    Each line is a JSON object.  `step` is the number of optimizer steps done at the
    time of measurement.  Metrics of evaluations have `eval_` names.
    """

    def __init__(self, out: Path, *, resumed_at: int):
        """Opens the files, and drops lines after the step at which the run resumes.

        Args:
          out: the run's folder.
          resumed_at: the restored step; 0 for a new run.

        Raises:
          InputError: if a file cannot be written; `write` and `close` raise it too.
        """
        self._path = out / "metrics.jsonl"
        self._file, self._board = None, None
        if jax.process_index() == 0:
            # Imported late: it imports torch if torch is installed.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import (
                Event,  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
                SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
            )

            _keep_before(self._path, resumed_at)
            board = out / "tensorboard"
            with self._writing():
                self._file = open_to_append(self._path)
                board.mkdir(exist_ok=True)
                # Not SummaryWriter: its thread dies when the disk is full, then blocks.
                self._board = EventsWriter(str(board / "events"))
                restart = SessionLog(status=SessionLog.START)
                self._board.write_event(
                    Event(step=resumed_at, session_log=restart, wall_time=time.time())
                )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line and flushes it; non-finite numbers are written as null."""
        if self._file is None or self._board is None:
            return
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        )
        from tensorboardX.summary import scalar

        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._writing():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                summary = scalar(name, value)
                self._board.write_event(
                    Event(step=step, summary=summary, wall_time=time.time())
                )
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._file is not None and self._board is not None:
            with self._writing():
                self._file.close()
                self._board.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise cannot_write(self._path, error) from error


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`, without those that are damaged.

    A line is a JSON object whose `step` is a whole number and whose other values are
    numbers or null.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict], list[int]]:
    """The records of a file, and the numbers of the damaged lines, from 1."""
    records, damaged = [], []
    text = path.read_bytes().decode("utf-8", "replace")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_record(record):
            records.append(record)
        elif line.strip():
            damaged.append(number)
    return records, damaged


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and all(
            x is None or (isinstance(x, int | float) and not isinstance(x, bool))
            for x in value.values()
        )
    )


def _keep_before(path: Path, step: int) -> None:
    """Keeps training lines up to `step` and evaluation lines before it.

    The resumed run evaluates again at `step`, which would duplicate that line.
    """
    if not path.exists():
        return
    records, damaged = _read(path)
    if damaged:
        numbers = ", ".join(map(str, damaged[:10])) + ", ..." * (len(damaged) > 10)
        _log.warning("%s: dropped damaged lines: %s", path, numbers)
    kept = [
        line
        for line in records
        if line["step"] < step or (line["step"] == step and "loss" in line)
    ]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
