"""The metrics of a run: `metrics.jsonl`, and copies in loggers."""

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxpref.files import cannot_write, open_to_append, write_whole
from jaxpref.runtime.loggers import Logger, LoggerName, make_logger

_log = logging.getLogger("jaxpref")


class MetricsWriter:
    """Writes lines of metrics on process 0; does nothing on the others.

    Each line is a JSON object.  `step` is the number of optimizer steps done at the
    time of measurement.  Metrics of evaluations have `eval_` names.
    """

    def __init__(
        self,
        out: Path,
        *,
        resumed_at: int,
        loggers: Sequence[LoggerName] = (),
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files, and drops lines after the step at which the run resumes.

        Args:
          out: the run's folder.
          resumed_at: the restored step; 0 for a new run.
          loggers: where the metrics go besides.
          config: the run's options by dotted name, for the loggers.

        Raises:
          InputError: if a file cannot be written; `write` and `close` raise it too.
        """
        self._path = out / "metrics.jsonl"
        self._file: TextIO | None = None
        self._loggers: list[Logger] = []
        if jax.process_index() == 0:
            _keep_before(self._path, resumed_at)
            options: Any = {"config": config or {}, "resumed_at": resumed_at}
            with self._writing():
                self._file = open_to_append(self._path)
                for name in loggers:
                    self._loggers.append(make_logger(name, out, **options))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line and flushes it; non-finite numbers are written as null."""
        if self._file is None:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._writing():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            for logger in self._loggers:
                logger.write(step, metrics)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._file is not None:
            with self._writing():
                self._file.close()
                for logger in self._loggers:
                    logger.close()

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
