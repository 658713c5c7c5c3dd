"""The loop in parts: a run is the same whether `fit` is called once or again."""

import contextlib
import functools
from pathlib import Path

import jax

from jaxpref import data, losses
from jaxpref.data.feed import Feed
from jaxpref.objectives import from_loss
from jaxpref.runtime.best import Best
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.digests import digests
from jaxpref.runtime.mesh import to_global
from jaxpref.runtime.metrics_file import MetricsWriter, read_metrics
from jaxpref.train import MeshConfig, OptimizerConfig, TrainConfig, fit, prepare
from jaxpref.train.begin import begin, restore
from jaxpref.train.guard import Guard
from jaxpref.train.options import CheckpointOptions, GuardOptions, LogOptions
from jaxpref.train.outputs import Run
from tests.compiled import compiled

TIMINGS = {"tokens_per_second", "pairs_per_second", "data_wait_fraction"}


def train(task, out: Path, *stops: int) -> dict[str, int]:
    """Trains in one call of `fit` for each of `stops`; digests of the last state."""
    out.mkdir()
    with contextlib.ExitStack() as stack:
        closing = lambda thing: stack.enter_context(contextlib.closing(thing))
        stack.enter_context(jax.set_mesh(task.mesh))
        checkpoints = closing(Checkpoints(out / "checkpoints", keep=9))
        restored = restore(task, checkpoints, out)
        begun = begin(task, restored, out, batch_size=8)
        batches = task.batches(reference=begun.reference["train"])
        feed = closing(Feed(batches, functools.partial(to_global, mesh=task.mesh)))
        run = Run(
            task,
            out,
            feed,
            begun,
            saving=CheckpointOptions(eval_every=2, save_every=2),
            logging=LogOptions(log_every=1),
            checkpoints=checkpoints,
            writer=closing(MetricsWriter(out, resumed_at=0)),
            guard=Guard(GuardOptions(), task.datasets, out),
            best=Best(None, out, None),
        )
        closing(run)
        state = begun.state
        for until in stops:
            state = fit(task, state, feed, run, until=until)
            assert int(state.step) == until
        run.finish(state)
        return digests(state)


def test_two_calls_of_fit_are_one(inputs, tmp_path, monkeypatch):
    """The same bits, files and metrics; one program; no step is saved a second time."""
    task = prepare(
        TrainConfig(
            model=str(inputs / "model"),
            data=str(inputs / "pairs.jsonl"),
            out=str(tmp_path / "run"),
            objective=from_loss(losses.dpo, beta=0.5),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            options=data.DataOptions(max_length=64, heldout_fraction=0.2),
            mesh=MeshConfig(data=8),
            max_steps=4,
            batch_size=8,
            compute_dtype="float32",
        )
    )
    saved, save = [], Checkpoints.save

    def noted(checkpoints, step, *args):
        saved.append(step)
        return save(checkpoints, step, *args)

    monkeypatch.setattr(Checkpoints, "save", noted)
    with compiled("train_step") as programs, compiled("score_step") as scores:
        parts = train(task, tmp_path / "parts", 2, 4)
        assert saved == [2, 4]
        whole = train(task, tmp_path / "whole", 4)
    assert saved == [2, 4, 2, 4]
    assert len(programs) == len(scores) == 1
    assert parts == whole
    found, expected = (
        [
            {name: x for name, x in line.items() if name not in TIMINGS}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("parts", "whole")
    )
    assert found == expected
    assert [x["step"] for x in found if "loss" in x] == [1, 2, 3, 4]
    assert [x["step"] for x in found if "eval_loss" in x] == [0, 2, 4]
