"""Values that must be equal on all processes, and restoring the same checkpoint."""

import functools
import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxpref.data import agreement
from jaxpref.errors import DIVERGED, InputError
from jaxpref.runtime import environment, processes
from jaxpref.train import read_metrics
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]


def among(monkeypatch, *others):
    """Simulates other processes with these values in the next comparison."""
    monkeypatch.setattr(processes.jax, "process_count", lambda: 1 + len(others))

    def gathered(mine):
        rows = [
            np.stack([processes._digest(v) for v in values.values()])
            for values in others
        ]
        return np.stack([mine, *rows])

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)


def test_equal_values_pass(monkeypatch):
    values = {"seed": 1, "data": {"b": 2, "a": [1.5, None]}, "raw": b"123"}
    among(monkeypatch, {**values, "data": {"a": [1.5, None], "b": 2}})
    processes.assert_equal_across_processes("step 3", values)


def test_a_difference_is_reported(monkeypatch):
    mine = {"seed": 1, "data": "a.jsonl", "batch_size": 8}
    among(monkeypatch, mine, mine | {"seed": 2, "batch_size": 16})
    with pytest.raises(
        InputError, match="^step 3: process 2 differs from process 0 in seed, batch_si"
    ):
        processes.assert_equal_across_processes("step 3", mine)


def test_the_majority_is_the_reference(monkeypatch):
    among(monkeypatch, {"seed": 2}, {"seed": 2})
    with pytest.raises(InputError, match="process 0 differs from process 1 in seed"):
        processes.assert_equal_across_processes("step 3", {"seed": 1})


def test_a_single_process_agrees_with_itself():
    processes.assert_equal_across_processes("step 3", {"seed": object()})
    assert processes.failing_processes(True) == []
    assert processes.failing_processes(False) == [0]
    np.testing.assert_array_equal(processes.broadcast_from_process_zero([4, 2]), [4, 2])
    assert environment.versions() == environment.versions()


class Batches:
    """An iterator over batches of four pairs in two micro-batches."""

    def __next__(self):
        first = 4 * self.state
        return types.SimpleNamespace(
            pair_index=np.arange(first, first + 4).reshape(2, 2, 1)
        )

    def set_state(self, state):
        self.state = state


def test_a_batch_of_other_pairs_is_detected(monkeypatch):
    pairs = types.SimpleNamespace(ids=np.array([f"id-{n}" for n in range(40)]))
    splits = types.SimpleNamespace(digest="d", train=pairs)
    feed = types.SimpleNamespace(state_before=lambda: 2, get_state=lambda: 3)
    ids = [f"id-{n}" for n in range(8, 12)]
    usual = {"the pairs": "d", "the position in the data": 3, "the batch": ids}
    # Rows may move within a micro-batch, but not to another micro-batch.
    seen = np.array([[9, 8], [10, 11]])[..., None]
    among(monkeypatch, usual)
    check = functools.partial(
        agreement.check_batch_agreement, 3, splits, feed, make_batches=Batches
    )
    check(seen)
    with pytest.raises(InputError, match="step 3: it was not computed from the pairs"):
        check(seen[::-1])
    among(monkeypatch, usual | {"the batch": ids[::-1]})
    with pytest.raises(InputError, match="process 1 differs from process 0 in the bat"):
        check(seen)


def test_batches_that_are_sampled_are_compared_by_their_position(monkeypatch):
    """They cannot be made again; the position has the answers of later steps."""
    splits = types.SimpleNamespace(digest="d")
    position = {"next_index": 3, "pending": {"groups": [[0, [[5, 6]]]]}}
    stream = types.SimpleNamespace(
        state_before=lambda: None, get_state=lambda: position
    )
    check = functools.partial(
        agreement.check_batch_agreement, 3, splits, stream, np.zeros((1, 2, 1), int)
    )
    usual = {"the pairs": "d", "the position in the data": position}
    among(monkeypatch, usual)
    check(make_batches=lambda: pytest.fail("makes them again"))
    among(monkeypatch, usual | {"the position in the data": position | {"pending": 0}})
    with pytest.raises(InputError, match="process 1 differs from process 0 in the pos"):
        check(make_batches=Batches)


def failing():
    raise InputError("file row 1: no answer")


@pytest.mark.parametrize("slow", [False, True])
def test_numbers_of_the_first_process_are_those_of_all(monkeypatch, slow):
    """What it broadcasts is recorded, and then received by another one."""
    monkeypatch.setattr(processes, "POLLING", 0.01)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    numbers, sent = np.array([0.1, np.nan, -1e-300]), []

    def function():
        time.sleep(0.1 * slow)
        return numbers

    def on(index, broadcast, function):
        monkeypatch.setattr(processes.jax, "process_index", lambda: index)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
        return processes.numbers_from_process_zero(function, len(numbers))

    send = lambda x: sent.append(x) or x
    receive = lambda x: sent.pop(0)
    on(0, send, function)
    assert (len(sent) > 3) == slow
    found = on(1, receive, lambda: pytest.fail("only the first one computes them"))
    np.testing.assert_array_equal(found, numbers)
    assert not sent
    for index, broadcast in ((0, send), (1, receive)):
        with pytest.raises(InputError, match="row 1: no answer"):
            on(index, broadcast, failing)


# ---- two processes ----------------------------------------------------------------

PROCESS = """
import dataclasses, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
mishaps = json.loads(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
from jaxpref import cli, data
from jaxpref.runtime.checkpoints import Checkpoints

class Mishap:
    def __init__(self, batches):
        self.batches, self.fetched = batches, 0
        self.set_state, self.get_state = batches.set_state, batches.get_state
    def __next__(self):
        self.fetched += 1
        if self.fetched == mishaps.get("twice_at"):
            next(self.batches)
        batch = next(self.batches)
        if self.fetched >= mishaps.get("nan_from", 1000):
            nan = np.full_like(batch.reference["reference_logps"], np.nan)
            batch = dataclasses.replace(batch, reference={"reference_logps": nan})
        return batch

make_batches = data.PackedLayout.batches
def batches(*args, **options):
    made = make_batches(*args, **options)
    # The whole batch is drawn again for the comparison, without the mishap.
    return made if args[0].process_count == 1 else Mishap(made)
data.PackedLayout.batches = batches

read = Checkpoints._read
def unlucky(self, step, abstract):
    if step == mishaps.get("unreadable"):
        return None, "no such file"
    return read(self, step, abstract)
Checkpoints._read = unlucky
cli.main()
"""


def run_two(inputs: Path, out: Path, *mishaps: dict, **changes: dict):
    """Exit codes and stderr of two processes with one device each."""
    settings = {
        "model": inputs / "model",
        "data": inputs / "pairs.jsonl",
        "out": out,
        "learning-rate": 1e-3,
        "heldout-fraction": 0,
        "max-steps": 8,
        "batch-size": 8,
        "log-every": 1,
        "save-every": 2,
        "max-bad-steps": 2,
    }
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index, mishap in enumerate(mishaps):
        own = settings | changes.get(f"of_{index}", {})
        argv = [str(x) for k, v in own.items() for x in (f"--{k}", v)]
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    PROCESS,
                    ROOT,
                    json.dumps(mishap),
                    "train",
                    *argv,
                ],
                env=os.environ
                | {
                    "XLA_FLAGS": xla_flags(1),
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(index),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        logs = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], logs


def errors(logs: list[str]) -> str:
    return "\n".join(
        line for x in logs for line in x.splitlines() if "jaxpref: error" in line
    )


def test_other_options_are_detected_before_anything_is_read(inputs, tmp_path):
    codes, logs = run_two(inputs, tmp_path / "run", {}, {}, of_1={"seed": 1})
    assert 2 in codes and 0 not in codes, logs
    message = "before the run: process 1 differs from process 0 in seed; start all"
    assert message in errors(logs), logs
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_stop_and_fall_back_together(inputs, tmp_path):
    """Bad steps, a checkpoint that one process cannot read, an extra batch in one."""
    out = tmp_path / "run"
    nan = {"nan_from": 6}
    codes, logs = run_two(inputs, out, nan, nan)
    assert codes == [DIVERGED] * 2 == [65] * 2, logs
    for stderr in logs:
        (line,) = [x for x in stderr.splitlines() if x.startswith("jaxpref: error: ")]
        assert "stopped at step 7: 2 bad steps in a row" in line
    assert sorted(checkpoints(out)) == ["2", "4"]
    bad = json.loads((out / "stopped" / "step_7.json").read_text())["bad_steps"]
    assert [(x["step"], len(x["pairs"])) for x in bad] == [(6, 8), (7, 8)]
    assert len({pair["id"] for x in bad for pair in x["pairs"]}) == 16
    lines = read_metrics(out / "metrics.jsonl")
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]

    # Both fall back to step 2, because process 1 cannot read step 4.  The third batch
    # from there is wrong in process 1, which is detected before step 6 is saved.
    codes, logs = run_two(inputs, out, {}, {"unreadable": 4, "twice_at": 3})
    assert "checkpoint 4 cannot be read (reported by process 1)" in logs[0], logs
    assert "checkpoint 4 cannot be read (no such file)" in logs[1], logs
    assert 2 in codes and 0 not in codes, logs
    error = errors(logs)
    assert (
        "step 6: process 1 differs from process 0 in the position in the data" in error
    )
    # Step 4 was written again.
    assert sorted(checkpoints(out)) == ["2", "4"]


def checkpoints(out: Path) -> list[str]:
    return [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()]


@pytest.mark.parametrize("error", [OSError("no file\nmore"), SystemExit(3)])
def test_other_errors_are_broadcast_and_raised_again(monkeypatch, error):
    sent = []
    monkeypatch.setattr(processes, "broadcast_text", lambda x: sent.append(x) or x)

    def fails():
        raise error

    with pytest.raises(type(error)) as found:
        processes.together(fails)
    assert found.value is error
    assert sent == [f"{type(error).__name__}: {str(error).splitlines()[0]}"]


@pytest.mark.parametrize(
    "message, error", [("InputError: a\nb", InputError), ("OSError: a", RuntimeError)]
)
def test_only_errors_of_input_are_final_on_the_others(monkeypatch, message, error):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "broadcast_text", lambda x: x or message)
    with pytest.raises(error) as found:
        processes.together(lambda: 1 / 0)
    assert str(found.value) in ("a\nb", "process 0: OSError: a")
