"""Where a run's metrics go besides `metrics.jsonl`: TensorBoard, W&B, MLflow, Trackio.

`metrics.jsonl` is the record of a run; these are copies for people to look at.  A run
that resumes writes its steps after the last checkpoint again.
"""

import importlib.util
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from jaxpref.errors import InputError, first_line
from jaxpref.files import write_json

_log = logging.getLogger("jaxpref")

LoggerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PROJECT = "jaxpref"
"""The project, or experiment, if the logger's own variable names none."""
IDS = "loggers.json"
"""File in the run's folder with the IDs by which a resumed run goes on."""


class Logger(Protocol):
    """Takes the metrics of a run, on process 0."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step; values may be NaN or infinite."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class TensorBoard:
    """Writes event files to OUT/tensorboard."""

    def __init__(self, out: Path, *, resumed_at: int):
        """Opens a file; a viewer then ignores earlier steps after `resumed_at`."""
        # Imported late: it imports torch if torch is installed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
            SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
        )

        folder = out / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._event = Event
        # Not SummaryWriter: its thread dies when the disk is full, then blocks.
        self._file = EventsWriter(str(folder / "events"))
        restart = SessionLog(status=SessionLog.START)
        self._write(step=resumed_at, session_log=restart)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        from tensorboardX.summary import scalar

        for name, value in metrics.items():
            self._write(step=step, summary=scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **content))


class WandB:
    """Writes to Weights & Biases; with WANDB_MODE=offline, to OUT/wandb."""

    def __init__(self, out: Path, *, config: Mapping[str, Any]):
        """Begins a run, or goes on with that of this folder."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.name,
            id=_id_of(out, "wandb", lambda: secrets.token_hex(8)),
            dir=str(out),
            resume="allow",
            config=dict(config),
        )
        # Its own step must not fall, as it does after a resume.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


class MLflow:
    """Writes to the server of MLFLOW_TRACKING_URI, or to OUT/mlflow.db."""

    def __init__(self, out: Path, *, config: Mapping[str, Any]):
        """Begins a run, or goes on with that of this folder."""
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        own = None if os.environ.get("MLFLOW_TRACKING_URI") else out.resolve()
        self._client = MlflowClient(own and f"sqlite:///{own}/mlflow.db")

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._create(name, own)
            run = self._client.create_run(experiment, run_name=out.name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in config.items()]
            for start in range(0, len(params), 100):  # at most 100 in a call
                self._client.log_batch(run, params=params[start : start + 100])
            return run

        self._id = _id_of(out, "mlflow", begin)
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, name: str, own: Path | None) -> str:
        # Without a server, the default folder is one in the current folder.
        place = own and (own / "mlflow").as_uri()
        return self._client.create_experiment(name, artifact_location=place)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`; values that are not finite are left out."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        found = [
            Metric(name, value, now, step)
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(self._id, metrics=found)

    def close(self) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._id)


class Trackio:
    """Writes to Trackio's local database, which `trackio show` displays."""

    def __init__(self, out: Path, *, config: Mapping[str, Any]):
        """Begins a run, or goes on with that of this folder."""
        import trackio  # pyright: ignore[reportMissingImports]

        name = _id_of(out, "trackio", lambda: f"{out.name}-{secrets.token_hex(4)}")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            config=dict(config),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


class Copy:
    """Another logger, whose failures do not end the run: it only gets copies."""

    def __init__(self, name: str, logger: Logger):
        """Passes metrics on until the logger fails."""
        self._name, self._logger, self._failed = name, logger, False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._attempt(lambda: self._logger.write(step, metrics))

    def close(self) -> None:
        """See `Logger`."""
        self._attempt(self._logger.close)

    def _attempt(self, act: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:  # of a server, a network, a database
            why = first_line(error)
            _log.warning("--logger %s: %s; it gets no more metrics", self._name, why)
            self._failed = True


def check_installed(names: Sequence[LoggerName]) -> None:
    """Checks that loggers can be used, before a run begins.

    Raises:
      InputError: if the package of one is not installed.
    """
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise InputError(
                f'--logger {name}: is not installed: pip install "jaxpref[{name}]"'
            )


def make_logger(
    name: LoggerName, out: Path, *, config: Mapping[str, Any], resumed_at: int
) -> Logger:
    """The logger of a name.

    Args:
      name: which one.
      out: the run's folder.
      config: the run's options by dotted name.
      resumed_at: the restored step; 0 for a new run.
    """
    if name == "tensorboard":
        return TensorBoard(out, resumed_at=resumed_at)
    make = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}[name]
    return Copy(name, make(out, config=config))


def _id_of(out: Path, name: str, make: Any) -> str:
    """The ID of this folder's run in a logger, made the first time."""
    path = out / IDS
    ids = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if name not in ids:
        ids[name] = make()
        write_json(path, ids)
    return ids[name]
