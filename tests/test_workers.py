"""Batches made in other processes: the same ones, and the same state."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpref import data
from tests.test_packing import make_pairs


def padded(pairs, **options):
    layout = data.padded_layout(pairs, batch_size=4)
    return layout.batches(pairs, data.uniform(pairs, 3), **options)


def packed(pairs, **options):
    order = data.uniform(pairs, 3)
    layout = data.packed_layout(pairs, order=order, row_length=64, batch_size=16)
    return layout.batches(pairs, order, **options)


@pytest.mark.parametrize("make", [padded, packed])
def test_processes_make_the_batches_of_one_thread(make):
    """In order, and resumed from any number of processes into any other."""
    pairs = make_pairs(40)
    expected = make(pairs)
    batches = make(pairs, processes=2)
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    for _ in range(3):
        equal(next(batches), next(expected))
    # From processes to a thread, from a thread to processes, and where it stands.
    state = json.loads(json.dumps(batches.get_state()))
    assert state == json.loads(json.dumps(expected.get_state()))
    batches.close()
    again, thread = make(pairs, processes=3), make(pairs)
    again.set_state(state)
    thread.set_state(state)
    for _ in range(4):
        batch = next(expected)
        equal(next(again), batch)
        equal(next(thread), batch)
    assert again.get_state() == expected.get_state()
    again.close()


def test_an_error_in_a_process_is_raised_here():
    pairs = make_pairs(8)
    too_few = {"reference_logps": np.zeros((8, 2), np.float32)}
    batches = padded(pairs, processes=1, reference=too_few)
    too_few["reference_logps"].resize((4, 2), refcheck=False)
    with pytest.raises(IndexError):
        for _ in range(4):
            next(batches)
    batches.close()


PARENT = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.test_workers import make_pairs, padded

if __name__ == "__main__":
    batches = padded(make_pairs(40), processes=2)
    for _ in range(4):
        next(batches)
    workers = multiprocessing.active_children()
    print(*(worker.pid for worker in workers), flush=True)
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(20):
        next(batches)
    print("goes on", all(worker.is_alive() for worker in workers), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    # Not closed: Python would end them with a SIGTERM, and wait.
"""


@pytest.mark.parametrize("end", ["killed", "exits"])
def test_processes_outlive_a_sigterm_but_not_their_parent(tmp_path, end):
    """A machine that shuts down tells all, and the parent still has to save."""
    root = Path(__file__).resolve().parents[1]
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, script, root, end],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    workers, goes_on = done.stdout.splitlines()
    assert goes_on == "goes on True" and len(workers.split()) == 2
    until = time.monotonic() + 30
    for pid in workers.split():
        stat = Path(f"/proc/{pid}/stat")
        # Nobody may be there to collect it: a zombie is dead too.
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < until, f"{pid} is still there"
            time.sleep(0.05)
