"""The best checkpoint by a metric: kept, remembered by a resumed run, exported."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.runtime.best import Best, parse_criterion
from jaxpref.train import outputs, read_metrics, run, task
from tests.test_guard import checkpoints, config_for, inputs  # noqa: F401


def test_the_best_is_remembered(tmp_path):
    best = Best("max:eval_x", tmp_path)
    values = [(0, 9.0), (2, 0.5), (4, np.nan), (6, 0.5), (8, 0.25), (10, 0.75)]
    found = [best.improved(step, {"eval_x": value}) for step, value in values]
    # Not before it was trained, not where there is no number, and not without a gain.
    assert found == [False, True, False, False, False, True]
    assert best.step == 10
    told = {"step": 10, "best": "max", "metric": "eval_x", "value": 0.75}
    assert json.loads((tmp_path / "best.json").read_text()) == told == best.get_state()
    assert Best("max:eval_x", tmp_path, told).step == 10
    assert not Best("max:eval_x", tmp_path, told).improved(12, {"eval_x": 0.7})
    assert Best("min:eval_x", tmp_path, told).step is None
    assert Best("max:eval_y", tmp_path, told).step is None
    least = Best("min:eval_x", tmp_path)
    assert [least.improved(n, {"eval_x": x}) for n, x in [(1, 3), (2, 4), (3, 2)]] == [
        True,
        False,
        True,
    ]


def test_criteria():
    assert parse_criterion("min:eval_loss") == ("min", "eval_loss")
    for wrong in ("eval_loss", "max:loss", "best:eval_loss", "max:"):
        with pytest.raises(InputError, match=f"--keep-best {wrong}: expected max:"):
            parse_criterion(wrong)


def test_a_metric_that_is_not_measured(tmp_path):
    best = Best("max:eval_accuracy", tmp_path)
    with pytest.raises(InputError, match="not measured; the evaluation has eval_loss"):
        best.improved(5, {"eval_loss": 1.0})
    with pytest.raises(InputError, match="no pairs: hold some out"):
        best.improved(5, {})


def test_to_export_the_best_it_must_be_said_by_what(inputs, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="--export best: choose a metric"):
        config_for(inputs, tmp_path, export="best")


def test_the_best_is_kept_survives_a_restart_and_is_exported(
    inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Evaluated every 3 steps, saved every 4; best at step 3, killed in step 8."""
    seen = with_metrics(monkeypatch)
    make_batches = data.PaddedLayout.batches

    class Mortal:
        def __init__(self, batches):
            self.batches = batches
            self.get_state, self.set_state = batches.get_state, batches.set_state

        def __next__(self):
            if self.get_state()["next_index"] == 7:
                raise RuntimeError("killed")
            return next(self.batches)

    out = tmp_path / "run"
    options = dict(
        eval_every=3,
        save_every=4,
        keep_checkpoints=1,
        keep_best="max:eval_x",
    )
    monkeypatch.setattr(
        data.PaddedLayout, "batches", lambda *a, **o: Mortal(make_batches(*a, **o))
    )
    with pytest.raises(RuntimeError, match="killed"):
        run(config_for(inputs, out, **options))
    assert checkpoints(out) == [3, 4]
    monkeypatch.setattr(data.PaddedLayout, "batches", make_batches)
    run(config_for(inputs, out, **options))
    assert seen == ["0", "3", "6", "6", "9", "12", "15", "16"]
    assert checkpoints(out) == [3, 16]
    assert json.loads((out / "best.json").read_text())["step"] == 3
    last = exported(out)
    np.testing.assert_array_equal(last, saved_norm(out, 16))
    # The same run again, which is done: only what it exports is another.
    run(config_for(inputs, out, **options, export="best"))
    best = exported(out)
    np.testing.assert_array_equal(best, saved_norm(out, 3))
    assert (best != last).any()
    assert checkpoints(out) == [3, 16]


def with_metrics(monkeypatch) -> list[str]:
    """Gives evaluations a metric that is best at step 3; the steps evaluated so far."""
    values = {0: 9.0, 3: 0.8, 6: 0.6, 9: 0.7, 12: 0.1, 15: 0.2, 16: 0.3}
    monkeypatch.setattr(
        outputs,
        "evaluation_metrics",
        lambda *_: {"eval_x": values[int(seen[-1])]},
    )
    seen = ["0"]  # its scores are the reference's
    score_dataset = task.score_dataset

    def noted(*args, title, **options):
        if title.startswith("evaluation at step "):
            seen.append(title.split()[-1])
        return score_dataset(*args, title=title, **options)

    monkeypatch.setattr(task, "score_dataset", noted)
    return seen


def test_a_run_stops_when_evaluations_no_longer_improve(
    inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    seen = with_metrics(monkeypatch)
    options = dict(eval_every=3, save_every=4, keep_best="max:eval_x", patience=2)
    run(config_for(inputs, tmp_path, **options))
    assert seen == ["0", "3", "6", "9"]
    assert checkpoints(tmp_path)[-1] == 9
    np.testing.assert_array_equal(exported(tmp_path), saved_norm(tmp_path, 9))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if "eval_x" in x] == [0, 3, 6, 9]
    assert lines[-1]["step"] == 9
    # The same command again does not go on; without the option, it does.
    run(config_for(inputs, tmp_path, **options))
    assert checkpoints(tmp_path)[-1] == 9
    run(config_for(inputs, tmp_path, **options | {"patience": None}))
    assert checkpoints(tmp_path)[-1] == 16
    with pytest.raises(InputError, match="--patience: choose a metric"):
        config_for(inputs, tmp_path, patience=2)


def exported(out) -> np.ndarray:
    return load_file(out / "export" / "model.safetensors")["model.norm.weight"]


def saved_norm(out, step: int) -> np.ndarray:
    folder = out / "checkpoints" / str(step) / "state"
    return np.asarray(ocp.StandardCheckpointer().restore(folder)["params"]["norm"])
