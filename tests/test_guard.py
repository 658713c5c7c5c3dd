"""Steps that go wrong: when a run stops, what it writes, and what it leaves alone."""

import dataclasses
import json
import types

import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.data import Datasets
from jaxpref.errors import InputError, Stopped
from jaxpref.objectives import from_loss
from jaxpref.runtime import heartbeat
from jaxpref.train import MeshConfig, OptimizerConfig, TrainConfig, run
from jaxpref.train import guard as guards
from jaxpref.train.guard import Guard
from jaxpref.train.options import GuardOptions
from tests.tiny import make_model_folder, make_pairs_file


def pairs_of(count: int):
    return types.SimpleNamespace(
        ids=np.array([f"id-{n}" for n in range(count)]),
        columns={
            "row": np.arange(count) + 100,
            "source": np.zeros(count, np.int8),
        },
    )


def guard_of(tmp_path, first=(), **options) -> Guard:
    options = {"max_bad_steps": 3, "max_loss_rise": 10.0} | options
    splits = types.SimpleNamespace(train=pairs_of(8))
    datasets = Datasets(splits, ("pairs.jsonl",), ())
    return Guard(GuardOptions(**options), datasets, tmp_path, first=first)


BATCH = np.arange(8).reshape(2, 4, 1)


def metrics_of(loss, *, finite=True, blamed=()):
    return {
        "loss": np.float32(loss),
        "grad_norm": np.float32(loss),
        "learning_rate": np.float32(1e-3),
        "finite": np.bool_(finite),
        "nonfinite_pairs": np.where(np.isin(BATCH, blamed), BATCH, -1),
    }


@pytest.mark.parametrize("start", [0.6931, 0.0, 25.0, -40.0, -0.5])
def test_a_loss_far_above_its_beginning_stops_the_run(tmp_path, start):
    """From m + 10 max(|m|, 1) on, three times in a row and not before."""
    guard = guard_of(tmp_path)
    noise = np.random.default_rng(0).normal(0, 0.1 * max(abs(start), 1), 10)
    most = np.median(np.float32(start + noise)) + 10 * max(
        abs(np.median(np.float32(start + noise))), 1
    )
    for step, loss in enumerate(start + noise, 1):
        guard.check_step(step, metrics_of(loss), BATCH)
    for step, loss in enumerate([most + 1, most + 1, most - 1, most + 1, most + 2], 11):
        guard.check_step(step, metrics_of(loss), BATCH)
        assert guard.healthy == (loss < most)
    with pytest.raises(Stopped, match="step 16: 3 bad steps in a row"):
        guard.check_step(16, metrics_of(most + 1), BATCH)


def test_a_run_does_not_end_well_whose_loss_has_just_risen(tmp_path):
    guard = guard_of(tmp_path)
    for step in range(1, 11):
        guard.check_step(step, metrics_of(0.7), BATCH)
    guard.check_step(11, metrics_of(np.nan, finite=False), BATCH)
    guard.check_end(11)  # the step was skipped
    guard.check_step(12, metrics_of(1e3), BATCH)
    with pytest.raises(Stopped, match="step 12: the loss at the last step rose"):
        guard.check_end(12)
    assert (tmp_path / "stopped" / "step_12.json").exists()
    guard.check_step(13, metrics_of(0.7), BATCH)
    guard.check_end(13)


def test_losses_of_any_kind_are_borne(tmp_path):
    """Falling without end, saturated with rare spikes, and growing by a little."""
    rng = np.random.default_rng(1)
    steps = np.arange(1000)
    spiky = np.where(rng.random(1000) < 0.3, 5.0, 1e-6)
    for series in (-steps, spiky, 0.7 + steps / 500, rng.standard_cauchy(1000)):
        guard = guard_of(tmp_path, max_bad_steps=10)
        for step, loss in enumerate(series, 1):
            guard.check_step(step, metrics_of(loss), BATCH)


def test_nothing_rises_too_far_where_that_is_allowed(tmp_path):
    guard = guard_of(tmp_path, [0.7] * 10, max_loss_rise=np.inf)
    for step in range(20):
        guard.check_step(step, metrics_of(1e30), BATCH)


def test_what_is_not_finite_is_counted_and_told(tmp_path, caplog):
    guard = guard_of(tmp_path)
    bad = metrics_of(np.nan, finite=False, blamed=[2, 5])
    guard.check_step(1, bad, BATCH)
    guard.check_step(2, metrics_of(0.5, finite=False), BATCH)
    assert not guard.healthy and guard.get_state() == []
    assert "Pairs with a non-finite loss: id-2, id-5" in caplog.messages[0]
    assert "The loss of every pair is finite" in caplog.messages[1]
    guard.check_step(3, metrics_of(0.25), BATCH)
    assert guard.healthy and guard.get_state() == [0.25]
    with pytest.raises(Stopped) as stopped:
        for step in (4, 5, 6):
            guard.check_step(step, bad, BATCH)
    path = tmp_path / "stopped" / "step_6.json"
    assert str(path) in str(stopped.value) and "\n" not in str(stopped.value)
    told = json.loads(path.read_text())
    assert told["step"] == 6 and "not finite" in told["why"]
    assert [x["step"] for x in told["bad_steps"]] == [4, 5, 6]
    last = told["bad_steps"][-1]
    assert last["loss"] == last["grad_norm"] == "nan"
    assert last["learning_rate"] == pytest.approx(1e-3)
    assert last["pairs"][2] == {
        "id": "id-2",
        "file": "pairs.jsonl",
        "row": 103,
        "finite": False,
    }
    assert [x["finite"] for x in last["pairs"]] == [n not in (2, 5) for n in range(8)]


def test_a_resumed_guard_judges_as_the_first(tmp_path):
    first = guard_of(tmp_path)
    for step in range(1, 15):
        first.check_step(step, metrics_of(0.5), BATCH)
    again = guard_of(tmp_path, json.loads(json.dumps(first.get_state())))
    for guard in (first, again):
        guard.check_step(15, metrics_of(10.4), BATCH)
        assert guard.healthy
        guard.check_step(16, metrics_of(10.6), BATCH)
        assert not guard.healthy


def test_a_full_disk_does_not_hide_why(tmp_path, monkeypatch):
    def full(path, content):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(guards, "write_json", full)
    guard = guard_of(tmp_path, max_bad_steps=1)
    with pytest.raises(Stopped, match="not finite.*No space left"):
        guard.check_step(1, metrics_of(np.nan, finite=False), BATCH)


# ---- whole runs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl")
    return folder


def config_for(inputs, out, **changes) -> TrainConfig:
    defaults = dict(
        model=str(inputs / "model"),
        data=str(inputs / "pairs.jsonl"),
        out=str(out),
        objective=from_loss(losses.dpo),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        options=data.DataOptions(heldout_fraction=0.2),
        mesh=MeshConfig(fsdp=8),
        max_steps=16,
        batch_size=8,
        row_length="none",
        log_every=1,
        eval_every=8,
        save_every=2,
        max_bad_steps=3,
    )
    return TrainConfig(**(defaults | changes))


class Spoiled:
    """Batches whose reference is changed from one of them on."""

    def __init__(self, batches, start: int, change):
        self._batches, self._start, self._change = batches, start, change
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        batch = next(self._batches)
        if self.get_state()["next_index"] < self._start:
            return batch
        logps = self._change(batch.reference["reference_logps"].copy())
        return dataclasses.replace(batch, reference={"reference_logps": logps})


def nan_in_one_row(logps):
    logps[0, 3] = np.nan
    return logps


def far_away(logps):
    logps[..., 0] += 1000.0
    return logps


def checkpoints(out) -> list[int]:
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("change", "start", "last_kept", "why"),
    [
        (nan_in_one_row, 5, 4, "not finite"),
        pytest.param(
            *(far_away, 13, 12, "far above the initial"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_stops_and_leaves_its_checkpoints(
    inputs, tmp_path, monkeypatch, change, start, last_kept, why
):
    """The last good step stays; the same data stop it again, other data do not."""
    make_batches = data.PaddedLayout.batches
    spoiled = lambda *args, **options: Spoiled(
        make_batches(*args, **options), start, change
    )
    config = config_for(inputs, tmp_path / "run")
    monkeypatch.setattr(data.PaddedLayout, "batches", spoiled)
    for _ in range(2):
        with pytest.raises(Stopped, match=why):
            run(config)
        assert checkpoints(tmp_path / "run") == [last_kept - 2, last_kept]
        assert not (tmp_path / "run" / "export").exists()
    (path,) = (tmp_path / "run" / "stopped").iterdir()
    # The third bad step is start + 2, and is noticed when the next one has begun.
    told = json.loads(path.read_text())
    assert path.name == f"step_{start + 2}.json"
    assert [x["step"] for x in told["bad_steps"]] == [start, start + 1, start + 2]
    assert all(len(x["pairs"]) == 8 for x in told["bad_steps"])
    wrong = [not pair["finite"] for pair in told["bad_steps"][0]["pairs"]]
    assert wrong == [change is nan_in_one_row and n == 3 for n in range(8)]
    # The row in the file is the pair's: 1-based, as in all messages.
    pair = told["bad_steps"][0]["pairs"][0]
    record = json.loads(
        (inputs / "pairs.jsonl").read_text().split("\n")[pair["row"] - 1]
    )
    assert record.keys() >= {"prompt"} and pair["file"] == config.data

    monkeypatch.setattr(data.PaddedLayout, "batches", make_batches)
    run(config)
    run(config_for(inputs, tmp_path / "whole"))
    found, expected = (
        (tmp_path / name / "export" / "model.safetensors").read_bytes()
        for name in ("run", "whole")
    )
    assert found == expected


def test_a_run_tells_how_it_gets_on(inputs, tmp_path, monkeypatch):
    file, told = tmp_path / "progress", []
    monkeypatch.setenv(heartbeat.VARIABLE, str(file))
    write = heartbeat._write

    def noted(suffix, text):
        write(suffix, text)
        told.append((suffix, text) if file.exists() else None)

    monkeypatch.setattr(heartbeat, "_write", noted)
    run(config_for(inputs, tmp_path / "run", save_every=8))
    assert None not in told
    steps = [text for suffix, text in told if text.startswith("step ")]
    assert steps == [f"step {n}" for n in range(1, 17)]
    assert [int(text) for suffix, text in told if suffix == heartbeat.SAVED] == [8, 16]
    assert any(text.endswith("pairs of evaluation at step 16") for _, text in told)
    assert any(text.startswith("reading ") for _, text in told)
    # What comes after the run is not watched.
    assert not file.exists()
    heartbeat.beat("more")
    assert not file.exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"max_bad_steps": 0}, "max_bad_steps 0: must be at least 1"),
        ({"max_loss_rise": 0.0}, "max_loss_rise 0.0: must be above 0"),
        ({"max_loss_rise": float("nan")}, "max_loss_rise nan: must be above 0"),
    ],
)
def test_options_out_of_range(inputs, tmp_path, changes, fragment):
    with pytest.raises(InputError, match=fragment):
        config_for(inputs, tmp_path, **changes)
