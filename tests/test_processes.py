"""Two processes of four devices are one process of eight: numbers, files and resume."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref.train import read_metrics
from tests.tiny import make_model_folder, make_pairs_file

ROOT = Path(__file__).resolve().parents[1]

PROCESS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from jaxpref import cli, data

batches_before_death = int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
fetched = 0

class Mortal:
    def __init__(self, batches):
        self.batches, self.set_state, self.get_state = (
            batches, batches.set_state, batches.get_state)
    def __next__(self):
        global fetched
        fetched += 1
        if fetched > batches_before_death:
            os.kill(os.getpid(), signal.SIGKILL)
        return next(self.batches)

make_batches = data.batches
data.batches = lambda *args, **kwargs: Mortal(make_batches(*args, **kwargs))
cli.main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl")
    return folder


def command(inputs: Path, out: Path) -> list[str]:
    settings = {
        "model": inputs / "model",
        "data": inputs / "pairs.jsonl",
        "out": out,
        "loss": "rdpo",
        "loss.flip-rate": 0.2,
        "learning-rate": 1e-3,
        "max-length": 64,
        "max-prompt-length": 32,
        "heldout-fraction": 0.2,
        "max-steps": 6,
        "batch-size": 8,
        "log-every": 1,
        "eval-every": 3,
        "save-every": 2,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    return ["train", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]


def run_processes(argv: list[str], count: int, *, batches_before_death: int = 99):
    """Starts `count` processes that share eight devices; their exits and outputs."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(count):
        environ = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}"
        }
        if count > 1:
            environ |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, ROOT, str(batches_before_death), *argv],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]


def test_two_processes_are_one(inputs, tmp_path):
    (one,) = run_processes(command(inputs, tmp_path / "one"), 1)
    assert one[0] == 0, one[2]

    # Both die at the fifth batch; the same command finishes what they began.
    two = command(inputs, tmp_path / "two")
    killed = run_processes(two, 2, batches_before_death=4)
    # The second may notice the first one's death before its own comes.
    assert killed[0][0] == -signal.SIGKILL and killed[1][0] != 0, killed[0][2]
    assert not (tmp_path / "two" / "export").exists()
    resumed = run_processes(two, 2)
    assert [code for code, *_ in resumed] == [0, 0], [r[2][-3000:] for r in resumed]
    assert "exported to" in resumed[0][1] and "exported to" not in resumed[1][1]

    expected, found = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")
    )
    shape = lambda lines: [(line["step"], "loss" in line) for line in lines]
    assert shape(found) == shape(expected)
    assert [line["step"] for line in found if "loss" in line] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(found, expected, strict=True):
        for name in a.keys() - {"tokens_per_second", "pairs_per_second", "waiting"}:
            # The same batches; float32 sums over devices come in another order.
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), (a, name)

    weights = [
        load_file(tmp_path / name / "export" / "model.safetensors")
        for name in ("one", "two")
    ]
    for name, expected in weights[0].items():
        np.testing.assert_allclose(weights[1][name], expected, atol=2e-5)


def test_wrong_input_ends_every_process(inputs, tmp_path):
    argv = [*command(inputs, tmp_path / "run"), "--batch-size", "6"]
    first, second = run_processes(argv, 2)
    complaints = [x for x in first[2].splitlines() if x.startswith("jaxpref: error: ")]
    assert len(complaints) == 1 and "batch_size 6" in complaints[0]
    # Without the first process the others are ended by jax.distributed, if not before.
    assert first[0] == 2 and second[0] != 0
