"""SIGTERM during training: the step is saved, and the run ends and can be resumed."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxpref.runtime import preemption
from jaxpref.runtime.preemption import PREEMPTED, Preempted, watched
from jaxpref.train import read_metrics
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED_LINE = re.compile(
    r"^jaxpref: preempted: saved step (\d+); the same command resumes$", re.MULTILINE
)

NOTIFIED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from jaxpref import cli
from jaxpref.data.feed import Feed

at_batch = int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
take, taken = Feed.draw, 0

def notified(feed, *state):
    global taken
    taken += 1
    if taken == at_batch:
        # The machine's signal, and the one that the supervisor forwards.
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return take(feed, *state)

Feed.draw = notified
cli.main()
"""


def start(inputs: Path, out: Path, *, steps: int, at_batch: int = 0, **environ):
    """Starts a process with one device, which gets SIGTERM at batch `at_batch`."""
    settings = {
        "model": inputs / "model",
        "data": inputs / "pairs.jsonl",
        "out": out,
        "learning-rate": 1e-3,
        "heldout-fraction": 0.2,
        "max-steps": steps,
        "batch-size": 8,
        "log-every": 1,
        "eval-every": 10,
        "save-every": 1000,
    }
    argv = ["train", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]
    return subprocess.Popen(
        [sys.executable, "-c", NOTIFIED, ROOT, str(at_batch), *argv],
        env=os.environ | {"XLA_FLAGS": xla_flags(1)} | environ,
        stderr=subprocess.PIPE,
        text=True,
    )


def checkpoints(out: Path) -> list[str]:
    return [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()]


def test_a_preempted_run_ends_like_an_undisturbed_one(inputs, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = lambda out, **options: start(inputs, out, steps=20, **options)
    preempted, undisturbed = run(cut, at_batch=8), run(whole)
    stderr = preempted.communicate(timeout=240)[1]
    assert preempted.returncode == PREEMPTED == 143, stderr
    assert PREEMPTED_LINE.findall(stderr) == checkpoints(cut) == ["8"]
    assert not (cut / "export").exists()
    for process in (undisturbed, run(cut)):
        stderr = process.communicate(timeout=240)[1]
        assert process.returncode == 0 and not PREEMPTED_LINE.search(stderr), stderr
    found, expected = (
        (out / "export" / "model.safetensors").read_bytes() for out in (cut, whole)
    )
    assert found == expected
    timings = {"tokens_per_second", "pairs_per_second", "data_wait_fraction"}
    found, expected = (
        [
            {k: v for k, v in line.items() if k not in timings}
            for line in read_metrics(out / "metrics.jsonl")
        ]
        for out in (cut, whole)
    )
    assert found == expected


def test_processes_agree_on_a_step_if_one_gets_the_signal(inputs, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        start(
            inputs,
            tmp_path / "run",
            steps=100_000,
            at_batch=8 if index == 1 else 0,
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in (0, 1)
    ]
    try:
        logs = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [PREEMPTED] * 2, logs
    (step,), (other,) = (PREEMPTED_LINE.findall(stderr) for stderr in logs)
    # The signal comes before step 8, which both may still complete.
    assert step == other and int(step) >= 8
    assert checkpoints(tmp_path / "run") == [step]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == int(step)


def test_the_first_signal_is_recorded_and_a_later_one_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), watched(0) as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop(2)
        monkeypatch.setattr(preemption, "SAME_NOTICE", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_message_of_a_preempted_run():
    assert PREEMPTED_LINE.fullmatch(f"jaxpref: {Preempted(7)}")[1] == "7"
    assert str(Preempted(7, saved=False)) == (
        "preempted: step 7 is bad, not saved; the same command resumes"
    )


def test_outside_the_main_thread_signals_are_left_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with watched(0) as should_stop:
            found.extend([should_stop(1), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, before]
