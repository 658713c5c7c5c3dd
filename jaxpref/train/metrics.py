"""Metrics of a run: `metrics.jsonl`, TensorBoard, and the progress bar."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from jaxpref.files import cannot_write, write_whole
from jaxpref.runtime import heartbeat


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
                self._file = self._path.open("a", encoding="utf-8")
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


class LateMetrics:
    """Fetches a step's metrics only after the next step has started.

    `tokens_per_second` and `pairs_per_second` measure training alone.  The clock is
    stopped within `paused`, and the first step of a process, which compiles, is left
    out.  `data_wait_fraction` is the share of that time spent within `waiting`.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        name: str,
        log_every: int,
        max_steps: int,
        check_step: Callable[[int, dict, jax.Array], None],
        start: int,
    ):
        """Shows the progress bar.

        Args:
          writer: writes the lines of metrics.
          name: the objective's name, shown in the bar.
          log_every: steps between two lines of metrics.
          max_steps: steps of the run.
          check_step: `check_step(step, metrics, pairs)` is called for every step, and
            may raise to end the run.
          start: steps done before this process began.
        """
        self._writer, self._check_step = writer, check_step
        self._log_every, self._max_steps = log_every, max_steps
        self._waiting = None
        self._compiled = False
        self._restart_clock()
        self._bar = tqdm(
            total=max_steps,
            initial=start,
            desc=name,
            unit="step",
            disable=jax.process_index() != 0,
        )

    def push(self, step: int, metrics: dict, pairs: jax.Array) -> None:
        """Takes the metrics of a step that has started, and writes the previous ones.

        Args:
          step: its number, from 1.
          metrics: the step's metrics.
          pairs: [A, R, S]; the pairs of its batch.

        Raises:
          Stopped: if `check_step` ends the run.
        """
        waiting, self._waiting = self._waiting, (step, metrics, pairs)
        if waiting is not None:
            self._write(*waiting)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the running step, writes its metrics, and stops the clock."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._write(*waiting)
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _write(self, step: int, metrics: dict, pairs: jax.Array) -> None:
        metrics = jax.device_get(metrics)
        heartbeat.beat(f"step {step}")
        self._check_step(step, metrics, pairs)
        del metrics["finite"], metrics["nonfinite_pairs"]
        self._tokens += int(metrics.pop("tokens"))
        self._pairs_done += int(metrics.pop("pairs"))
        self._bar.update()
        if not self._compiled:
            self._compiled = True
            self._restart_clock()
        if step % self._log_every == 0 or step in (1, self._max_steps):
            values = {name: float(value) for name, value in metrics.items()}
            if self._tokens:
                seconds = self._seconds + time.perf_counter() - self._since
                values["tokens_per_second"] = self._tokens / seconds
                values["pairs_per_second"] = self._pairs_done / seconds
                values["data_wait_fraction"] = self._waited / seconds
            self._restart_clock()
            self._writer.write(step, values)
            shown = {"loss": f"{values['loss']:.4f}"}
            if "rewards/accuracies" in values:
                shown["accuracy"] = f"{values['rewards/accuracies']:.2f}"
            if "data_wait_fraction" in values:
                shown["waiting"] = f"{values['data_wait_fraction']:.1%}"
            self._bar.set_postfix(shown)

    def _restart_clock(self) -> None:
        self._tokens = self._pairs_done = 0
        self._seconds, self._since = 0.0, time.perf_counter()
        self._waited = 0.0


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; an incomplete last line is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _keep_before(path: Path, step: int) -> None:
    """Keeps training lines up to `step` and evaluation lines before it.

    The resumed run evaluates again at `step`, which would duplicate that line.
    """
    if not path.exists():
        return
    kept = [
        line
        for line in read_metrics(path)
        if line["step"] < step or (line["step"] == step and "loss" in line)
    ]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
