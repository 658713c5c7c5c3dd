"""Metrics in W&B, MLflow and Trackio, read back with their own programs."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref.runtime.metrics_file import MetricsWriter

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.parity


def write_twice(out, name):
    """A run of two steps that is killed after the second and repeats it."""
    config = {"model": "m", "optimizer.learning_rate": 1e-6}
    out.mkdir()
    for resumed_at, loss in ((0, 0.7), (1, 0.5)):
        writer = MetricsWriter(
            out, resumed_at=resumed_at, loggers=[name], config=config
        )
        if not resumed_at:
            writer.write(1, {"loss": 0.9, "rewards/margins": math.nan})
        writer.write(2, {"loss": loss, "rewards/margins": 0.25})
        writer.close()
    return json.loads((out / "loggers.json").read_text())[name]


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run = write_twice(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    losses = client.get_metric_history(run, "loss")
    assert [(x.step, x.value) for x in losses] == [(1, 0.9), (2, 0.7), (2, 0.5)]
    (margin, _) = client.get_metric_history(run, "rewards/margins")
    assert (margin.step, margin.value) == (2, 0.25)  # NaN is left out
    found = client.get_run(run)
    assert found.data.params == {"model": "m", "optimizer.learning_rate": "1e-06"}
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["run"]


def records(data):
    """The records of a W&B file: 7 bytes, then the log format of LevelDB."""
    at, part = 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield part
            part = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = write_twice(tmp_path / "run", "wandb")
    rows, names = [], set()
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")):
        assert path.name == f"run-{run}.wandb"
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            names |= {record.run.display_name} - {""}
            row = {
                "/".join(x.nested_key) or x.key: json.loads(x.value_json)
                for x in record.history.item
            }
            if "loss" in row:
                rows.append((row["step"], row["loss"]))
    assert rows == [(1, 0.9), (2, 0.7), (2, 0.5)] and names == {"run"}


READ_TRACKIO = """
import json, sys
from pathlib import Path
from tests.parity.test_loggers import write_twice
run = write_twice(Path(sys.argv[1]), "trackio")
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("jaxpref", run)
Path(sys.argv[2]).write_text(json.dumps([(x["step"], x["loss"]) for x in rows]))
"""


def test_trackio(tmp_path):
    """In a process of its own: its folder is chosen when it is imported."""
    pytest.importorskip("trackio")
    found = tmp_path / "rows.json"
    environ = os.environ | {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO, str(tmp_path / "run"), str(found)],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text()) == [[1, 0.9], [2, 0.7], [2, 0.5]]
