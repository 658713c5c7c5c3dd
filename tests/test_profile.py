"""Profiles of a few steps are written and do not change the results."""

import dataclasses
import gzip
import json

import jax.numpy as jnp

from jaxpref import data, losses
from jaxpref.objectives import from_loss
from jaxpref.runtime.profile import WARM, profiled
from jaxpref.train import read_metrics, run
from jaxpref.train.config import MAY_CHANGE
from tests.test_training import config_for
from tests.tiny import make_model_folder, make_pairs_file


def events(folder):
    """The events of a trace, as Perfetto reads them."""
    (path,) = folder.rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_profiling_does_not_change_the_run(tmp_path):
    inputs = make_model_folder(tmp_path / "m"), make_pairs_file(tmp_path / "p.jsonl")
    config = config_for(
        inputs,
        tmp_path / "plain",
        max_steps=5,
        objective=from_loss(losses.cpo),
        options=data.DataOptions(max_length=64, heldout_fraction=0.0),
    )
    run(config)
    run(dataclasses.replace(config, out=str(tmp_path / "traced"), profile=2))
    written = [
        (tmp_path / name / "export" / "model.safetensors").read_bytes()
        for name in ("plain", "traced")
    ]
    assert written[0] == written[1]
    history = [
        [(line["step"], line["loss"]) for line in lines if "loss" in line]
        for lines in (
            read_metrics(tmp_path / name / "metrics.jsonl")
            for name in ("plain", "traced")
        )
    ]
    assert history[0] == history[1] and len(history[0]) == 5

    folder = tmp_path / "traced" / "profile" / "process_0"
    (whole,) = folder.rglob("*.xplane.pb")
    assert whole.stat().st_size > 1000
    steps = {
        int(event["args"]["step_num"])
        for event in events(folder)
        if event.get("name") == "train_step" and "step_num" in event.get("args", {})
    }
    assert steps == {WARM + 1, WARM + 2}
    assert not (tmp_path / "plain" / "profile").exists()
    assert "profile" in MAY_CHANGE  # when a run is resumed


def test_without_a_profile_nothing_is_wrapped(tmp_path):
    step = lambda state: state
    with profiled(step, tmp_path, steps=0) as found:
        assert found is step


def test_a_run_may_end_before_its_profile(tmp_path):
    step = lambda state, x: (state + x, {})
    with profiled(step, tmp_path, steps=100) as traced:
        state = jnp.zeros(())
        for _ in range(WARM + 1):
            state, _ = traced(state, 1.0)
    assert state == WARM + 1
    assert events(tmp_path / "profile" / "process_0")


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with profiled(lambda state: (state + 1, {}), tmp_path, steps=2) as traced:
        state = jnp.zeros(())
        for _ in range(WARM + 3):
            state, _ = traced(state)
    assert state == WARM + 3
    assert "profiling failed" in caplog.text
