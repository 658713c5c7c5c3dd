"""How batches come to the devices: ahead, without a hidden copy, resumable."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from unittest import mock

import jax
import numpy as np
import pytest

from jaxpref.data.feed import AHEAD, Feed
from jaxpref.errors import InputError
from jaxpref.runtime import memory
from jaxpref.train import read_metrics, run, task
from tests.compiled import compiled
from tests.test_training import config_for
from tests.tiny import make_model_folder, make_pairs_file

LAYOUTS = {"padded": {}, "packed": {"row_length": 64, "batch_size": 16}}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return (
        make_model_folder(folder / "model"),
        make_pairs_file(folder / "pairs.jsonl"),
    )


class Numbers:
    """0, 1, 2, ...; the state is the next one; `drawn` counts."""

    def __init__(self, fails_at=None):
        self.drawn, self._fails_at = 0, fails_at
        self.came = threading.Semaphore(0)

    def __next__(self):
        if self.drawn == self._fails_at:
            raise ValueError("row 3 is wrong")
        self.drawn += 1
        self.came.release()
        return self.drawn - 1

    def get_state(self):
        return self.drawn


def test_batches_are_placed_ahead_and_the_state_is_that_of_the_last_one():
    numbers = Numbers()
    feed = Feed(numbers, lambda n: n * 10)
    assert feed.get_state() == 0 and numbers.drawn == 0
    for n in range(5):
        assert feed.draw() == 10 * n
        # The thread goes on while the batch is in use, and only so far.
        while numbers.drawn < n + 1 + AHEAD:
            assert numbers.came.acquire(timeout=30)
        assert feed.get_state() == n + 1
    feed.close()
    assert numbers.drawn <= 5 + AHEAD


def test_an_error_comes_in_its_place():
    feed = Feed(Numbers(fails_at=2), lambda n: n)
    assert [feed.draw(), feed.draw()] == [0, 1]
    for _ in range(2):  # and not for ever nothing
        with pytest.raises(ValueError, match="row 3 is wrong"):
            feed.draw()
    feed.close()


def test_a_closed_feed_has_no_more():
    feed = Feed(Numbers(), lambda n: n)
    assert feed.draw() == 0
    feed.close()
    with pytest.raises(StopIteration):
        feed.draw()


@each_layout
def test_a_step_copies_nothing_that_is_not_asked_for(
    inputs, tmp_path, monkeypatch, layout
):
    """Under a guard, for all threads, from the second step to the last."""
    make = task.make_train_step
    steps = []

    def guarded(*arguments):
        step = make(*arguments)

        def count(*arguments):
            out = step(*arguments)
            steps.append(len(steps))
            guard = "disallow" if 1 <= len(steps) < 5 else "allow"
            jax.config.update("jax_transfer_guard", guard)
            return out

        count.lower = step.lower
        return count

    monkeypatch.setattr(task, "make_train_step", guarded)
    config = config_for(inputs, tmp_path / "run", max_steps=5, save_every=9)
    try:
        run(dataclasses.replace(config, **LAYOUTS[layout], eval_every=9))
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
            jax.config.update("jax_transfer_guard", "disallow")
            jax.jit(lambda x: x)(np.ones(3))
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert len(steps) == 5
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    waiting = [
        line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line
    ]
    assert len(waiting) == 4 and all(0 <= share <= 1 for share in waiting)


@pytest.mark.parametrize(
    "layout", [pytest.param("padded", marks=pytest.mark.slow), "packed"]
)
def test_a_run_with_loader_processes_resumes_without_them(inputs, tmp_path, layout):
    """The same bits, wherever batches are made before and after."""
    changes = LAYOUTS[layout] | {"max_steps": 4, "eval_every": 9}
    whole = config_for(inputs, tmp_path / "whole", **changes)
    run(whole)
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"), loader_processes=2)
    run(cut)
    weights = "export/model.safetensors"
    expected = (tmp_path / "whole" / weights).read_bytes()
    assert (tmp_path / "cut" / weights).read_bytes() == expected
    shutil.rmtree(tmp_path / "cut" / "export")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    run(dataclasses.replace(cut, loader_processes=0))
    assert (tmp_path / "cut" / weights).read_bytes() == expected


def test_what_is_recomputed_is_chosen_by_memory_and_remembered(
    inputs, tmp_path, monkeypatch, capsys
):
    config = config_for(inputs, tmp_path / "run", max_steps=2, remat="auto")
    with compiled("score_step") as programs:
        run(config)
    assert len(programs) == 1  # for the reference and for evaluation
    path = tmp_path / "run" / "memory.json"
    found = json.loads(path.read_text())
    assert found["remat"] == "none" and found["step_bytes"].keys() == {"none"}
    assert "remat none: a step needs none " in capsys.readouterr().out
    # An interrupted run goes on with the stored policy, without comparing again.
    for name in ("checkpoints", "export"):
        shutil.rmtree(tmp_path / "run" / name)
    path.write_text(json.dumps(found | {"remat": "dots"}))
    chosen = []

    def remembered(scorer, *arguments):
        chosen.append(scorer.model.numerics.remat)
        return make(scorer, *arguments)

    make = task.make_train_step
    monkeypatch.setattr(task, "make_train_step", remembered)
    run(config)
    assert chosen[-1] == "dots" and "full" not in chosen
    assert json.loads(path.read_text()) == found | {"remat": "dots"}
    # On devices that are too small for it, the run is refused.
    for name in ("checkpoints", "export"):
        shutil.rmtree(tmp_path / "run" / name)
    monkeypatch.setattr(memory, "memory_limit", lambda: 1)
    with pytest.raises(InputError, match="need .* per device"):
        run(config)


@pytest.mark.parametrize("remat", ["none", "auto"])
def test_a_step_that_does_not_fit_is_refused_with_the_numbers(
    inputs, tmp_path, monkeypatch, remat
):
    """Before the first step; the folder stays free for another config."""
    monkeypatch.setattr(memory, "memory_limit", lambda: 1)
    out = tmp_path / "run"
    config = config_for(inputs, out, max_steps=2, remat=remat)
    with pytest.raises(
        InputError, match=r"need \d+ MiB .*, which has 0 MiB; .*--batch-size"
    ):
        run(config)
    assert not (out / "config.json").exists() and not (out / "memory.json").exists()


def test_sizes_that_nobody_reports_refuse_nothing(monkeypatch):
    assert memory.required_bytes(lambda: mock.Mock(memory_analysis=lambda: None)) == 0
    gpu = mock.Mock(platform="gpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    assert memory.memory_limit() == float("inf")
    memory.check_memory(1e15)


def test_the_first_policy_that_fits_is_chosen(tmp_path, monkeypatch):
    """A program that the compiler refuses for its size does not fit."""
    monkeypatch.setattr(memory, "memory_limit", lambda: 1000)
    monkeypatch.setattr(memory, "step_bytes", int)

    def step_of(policy):
        def compile_step():
            if policy == "none":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return {"dots": "950", "full": "900"}[policy]

        return compile_step

    assert memory.choose_remat(tmp_path, step_of) == "full"
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["step_bytes"] == {"none": None, "dots": 950, "full": 900}

    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        memory.choose_remat(tmp_path, lambda policy: broken)


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "memory.max",))
    whole = memory.memory_limit()
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_limit() == whole
    (tmp_path / "memory.max").write_text("8000000\n")
    assert memory.memory_limit() == 8_000_000 // jax.local_device_count()


def test_an_error_does_not_wait_for_the_compiler():
    """The process ends, although a thread of its own still compiles."""
    script = """
import sys, time
from jaxpref.cli import process
from jaxpref.errors import InputError
from jaxpref.runtime.compilation import in_background
from jaxpref.runtime.entry import entry_point

def command():
    with entry_point():
        in_background(lambda: time.sleep(600))
        raise InputError("another run")

process.run_command = command
process.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "error: another run" in done.stderr
