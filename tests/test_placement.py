"""Nothing large ever lies whole on one device: weights, moments, batches."""

import contextlib
import importlib
import math
import shutil

import jax
import pytest

from jaxpref import data, losses
from jaxpref.models import build
from jaxpref.objectives import from_loss
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.digests import _digest
from jaxpref.scoring import make_scorer
from jaxpref.scoring import scorer as scorers
from jaxpref.train import MeshConfig, make_mesh, run
from jaxpref.train import task as tasks
from jaxpref.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxpref.train.task import Programs
from tests.test_optimizer import CONFIGS
from tests.test_training import config_for
from tests.tiny import make_model_folder, make_pairs_file, tiny_config

MESH = MeshConfig(fsdp=4, tensor=2)
SMALL = 512  # bytes; the vectors of norms, and what is one number a pair


@pytest.mark.parametrize(
    "config", [OptimizerConfig(), CONFIGS["adafactor"]], ids=["adamw", "adafactor"]
)
def test_programs_that_begin_a_run_hold_its_parts_alone(config):
    """By what the compiler says that they need of each device."""
    model = build(
        tiny_config(vocab_size=16384, hidden_size=256, tie_word_embeddings=True)
    )
    mesh = make_mesh(MESH)
    schedule = make_schedule(config, 10)
    tx = make_optimizer(config, schedule)
    objective = from_loss(losses.dpo)
    task = Programs(
        scorer=make_scorer(model, objective.scores),
        objective=objective,
        optimizer=tx,
        schedule=schedule,
        mesh=mesh,
        layout=data.PaddedLayout(
            sequence_length=48, predictions=24, num_completions=2, batch_size=8
        ),
    )
    with jax.set_mesh(mesh):
        params, state = task.abstract_params(), task.abstract_state()
        largest = max(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        )
        whole = lambda tree: sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )
        programs = {
            "parameters": (jax.jit(model.init).lower(jax.random.key(0)), params),
            "state": (jax.jit(task.new_state, donate_argnums=0).lower(params), state),
            "digests": (_digest.lower(jax.tree.leaves(state)), None),
        }
        for name, (lowered, made) in programs.items():
            found = lowered.compile().memory_analysis()
            assert found.temp_size_in_bytes < largest / 2, (name, found)
            if made is not None:
                # Norms, and an eighth of everything else.
                share = found.output_size_in_bytes / whole(made)
                assert share < 1 / 8 + 0.02, (name, share)


@contextlib.contextmanager
def watched(monkeypatch):
    """Looks at all arrays there are, after each thing that makes some."""
    before = jax.live_arrays()  # of other tests
    known, seen = {id(x) for x in before}, []

    def look(where):
        for x in jax.live_arrays():
            if id(x) in known or x.nbytes <= SMALL:
                continue
            # By its sharding, which tells even of an array that was donated meanwhile.
            part = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            seen.append(where)
            assert part * 4 <= x.nbytes, (where, x.shape, x.sharding)

    def looking(name, function):
        def wrapped(*args, **kwargs):
            found = function(*args, **kwargs)
            look(name)
            return found

        wrapped.lower = getattr(function, "lower", None)
        return wrapped

    running = importlib.import_module("jaxpref.train.run")  # not the function
    for module, name in ((scorers, "load_params"), (running, "to_global")):
        wrapped = looking(name, getattr(module, name))
        monkeypatch.setattr(module, name, wrapped)
    make = tasks.make_train_step
    monkeypatch.setattr(
        tasks, "make_train_step", lambda *args: looking("step", make(*args))
    )
    for name in ("restore", "save"):
        wrapped = looking(name, getattr(Checkpoints, name))
        monkeypatch.setattr(Checkpoints, name, wrapped)
    yield seen


def test_no_array_of_a_run_lies_whole_on_a_device(tmp_path, monkeypatch):
    inputs = make_model_folder(tmp_path / "m"), make_pairs_file(tmp_path / "p.jsonl")
    config = config_for(
        inputs,
        tmp_path / "run",
        mesh=MESH,
        max_steps=4,
        batch_size=16,
        options=data.DataOptions(max_length=64, heldout_fraction=0.2),
    )
    with watched(monkeypatch) as seen:
        run(config)
        assert {"load_params", "to_global", "step", "save"} <= set(seen)
        shutil.rmtree(tmp_path / "run" / "export")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
        seen.clear()
        run(config)
        assert {"restore", "to_global", "step"} <= set(seen)
