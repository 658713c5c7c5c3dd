"""What a run writes about itself: rates of training alone, and TensorBoard's file."""

import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxpref.errors import InputError
from jaxpref.runtime import late_metrics as metrics
from jaxpref.runtime import loggers
from jaxpref.runtime.metrics_file import MetricsWriter
from jaxpref.train import read_metrics


class Clock:
    """Stands still unless told."""

    now = 1000.0

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def step_metrics():
    return {
        "loss": np.float32(0.5),
        "finite": np.True_,
        "nonfinite_pairs": np.full((1, 4), -1),
        "tokens": np.int32(100),
        "pairs": np.int32(4),
    }


def test_rates_leave_out_compiling_evaluating_and_saving(clock, tmp_path):
    writer = MetricsWriter(tmp_path, resumed_at=0)
    checked = []
    late = metrics.LateMetrics(
        writer,
        name="dpo",
        log_every=2,
        max_steps=6,
        check_step=lambda step, *_: checked.append(step),
        start=0,
    )
    clock.now += 100  # compiles
    late.push(1, step_metrics(), np.arange(4)[None])
    with late.paused():
        clock.now += 1000  # evaluates
    for step in (2, 3, 4):
        clock.now += 2
        late.push(step, step_metrics(), np.arange(4)[None])
    with late.paused():
        clock.now += 1000  # saves
    for step in (5, 6):
        clock.now += 5
        late.push(step, step_metrics(), np.arange(4)[None])
    with late.paused():
        pass
    late.close()
    writer.close()
    assert checked == [1, 2, 3, 4, 5, 6]
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert sorted(lines) == [1, 2, 4, 6]
    assert "tokens_per_second" not in lines[1]
    # A step's metrics come while the next one runs: step 2 is written after 4 seconds.
    assert lines[2]["tokens_per_second"] == 100 / 4
    assert lines[4]["tokens_per_second"] == 200 / 2
    assert lines[6]["pairs_per_second"] == 8 / 10


def test_tensorboard_file(tmp_path):
    writer = MetricsWriter(tmp_path, resumed_at=3, loggers=["tensorboard"])
    writer.write(4, {"rewards/chosen": 0.25, "loss": float("nan")})
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, content, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    version, restart, first, second = events
    assert version.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (3, SessionLog.START)
    assert (first.step, first.summary.value[0].tag) == (4, "rewards/chosen")
    assert first.summary.value[0].simple_value == 0.25
    assert np.isnan(second.summary.value[0].simple_value)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 4, "rewards/chosen": 0.25, "loss": None}
    ]


def test_a_logger_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    loggers.check_installed(["tensorboard"])
    with pytest.raises(InputError, match=r"jaxpref\[trackio\]"):
        loggers.check_installed(["tensorboard", "trackio"])
