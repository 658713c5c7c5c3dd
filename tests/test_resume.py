"""A run resumes only what it began: anything else is refused, by name, unharmed."""

import dataclasses
import gzip
import json
import shutil
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpref import data, losses
from jaxpref.data.read import read_datasets
from jaxpref.errors import InputError
from jaxpref.files import LOCK
from jaxpref.models.weights import Weights
from jaxpref.objectives import from_loss
from jaxpref.runtime.digests import digest_of_meta
from jaxpref.runtime.provenance import (
    Content,
    Provenance,
    changed_options,
    differences,
)
from jaxpref.runtime.run_folder import locked
from jaxpref.scoring import provenance
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    begin,
    read_metrics,
    run,
)
from jaxpref.train.config import options_that_matter, to_json
from jaxpref.train.optimizer import make_schedule
from tests.tiny import make_model_folder, make_pairs_file

STEADY = OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT)
WEIGHTS = "export/model.safetensors"


def config_for(folder: Path, out: Path, **changes) -> TrainConfig:
    """A loss without a reference, which so knows the model by its checkpoints only."""
    defaults = dict(
        model=str(folder / "model"),
        data=str(folder / "pairs.jsonl"),
        out=str(out),
        objective=from_loss(losses.simpo, beta=2.0, gamma=0.5),
        optimizer=STEADY,
        options=data.DataOptions(max_length=64, heldout_fraction=0.0),
        mesh=MeshConfig(data=8),
        max_steps=2,
        batch_size=8,
        row_length="none",
        save_every=9,  # the last step is always saved
        log_every=1,
    )
    return TrainConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Inputs and a finished run of two steps; tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl")
    run(config_for(folder, folder / "run"))
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found}


def refused(config: TrainConfig, *fragments: str) -> None:
    """The run is refused in one line, and nothing in OUT has changed."""
    before = contents(Path(config.out))
    with pytest.raises(InputError) as error:
        run(config)
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    assert contents(Path(config.out)) == before | {str(Path(config.out) / LOCK): b""}


def other(**changes):
    return dataclasses.replace(STEADY, **changes)


SHORTER = data.DataOptions(max_length=32, heldout_fraction=0.0)
OPTIONS = {
    "learning rate": (
        {"optimizer": other(learning_rate=2e-2)},
        "optimizer.learning_rate (0.01 -> 0.02)",
    ),
    "beta": (
        {"objective": from_loss(losses.simpo, beta=1.0, gamma=0.5)},
        "loss.beta (2.0 -> 1.0)",
    ),
    "loss": ({"objective": from_loss(losses.cpo)}, "loss.name ('simpo' -> 'cpo')"),
    "batch": ({"batch_size": 16}, "batch_size (8 -> 16)"),
    "seed": ({"seed": 1}, "seed (0 -> 1)"),
    "decay": ({"optimizer": other(decay=Decay.COSINE)}, "optimizer.decay"),
    "warm-up": ({"optimizer": other(warmup_steps=1)}, "optimizer.warmup_steps"),
    "length": ({"options": SHORTER}, "options.max_length (64 -> 32)"),
    "dtype": ({"compute_dtype": "bfloat16"}, "compute_dtype"),
    "two at once": (
        {"batch_size": 16, "seed": 3},
        "batch_size (8 -> 16), seed (0 -> 3)",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_computed_depends_on_an_option(name):
    changes, fragment = OPTIONS[name]
    config = config_for(Path(), Path())
    made, now = (
        options_that_matter(to_json(x))
        for x in (config, dataclasses.replace(config, **changes))
    )
    assert fragment in ", ".join(changed_options(made, now))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "a", "data": "b", "out": "c"},
        {"max_steps": 9},
        {"max_steps": None, "epochs": 2.0},
        {"mesh": MeshConfig(data=1, fsdp=8)},
        {"save_every": 7, "keep_checkpoints": 1, "log_every": 3, "profile": 1},
        {"keep_best": "min:eval_loss", "export": "best", "max_bad_steps": 3},
        {"loader_processes": 2, "max_loss_rise": 5.0, "explain_compiles": True},
    ],
)
def test_what_is_computed_does_not_depend_on_it(changes):
    config = config_for(Path(), Path())
    made, now = (
        options_that_matter(to_json(x))
        for x in (config, dataclasses.replace(config, **changes))
    )
    assert changed_options(made, now) == []


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path) -> None:
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    path.unlink()
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, path)


def edit_pairs(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], *lines[2:]]))


def names_of(folder: Path) -> dict[str, Content]:
    """The files that a run computes with."""
    tokenizer = data.load_tokenizer(folder / "model")
    datasets = read_datasets(
        tokenizer,
        data.DataOptions(max_length=64, heldout_fraction=0.2),
        kind=data.PAIRS,
        mix=None,
        train=str(folder / "pairs.jsonl"),
        heldout=None,
    )
    weights = Weights(folder / "reference")
    reference = types.SimpleNamespace(
        folder=weights.folder, weights=weights, name="reference"
    )
    return provenance.contents(Weights(folder / "model"), reference, {}, datasets)


def sampled_by(model: Path, **fields) -> None:
    (model / "generation_config.json").write_text(json.dumps(fields))


FILES = {
    "another RoPE": (
        lambda f: edit_json(f / "model/config.json", rope_theta=5000.0),
        ["the config.json of the model"],
    ),
    "weights": (
        lambda f: edit_weights(f / "model/model.safetensors"),
        ["the weights of the model"],
    ),
    "another model": (
        lambda f: make_model_folder(f / "model", seed=1),
        ["the weights of the model"],
    ),
    "a model of another size": (
        lambda f: make_model_folder(f / "model", num_layers=1),
        ["the config.json of the model", "the weights of the model"],
    ),
    "the weights under another name": (
        lambda f: (f / "reference/model.safetensors").rename(
            f / "reference/model-00001-of-00001.safetensors"
        ),
        ["the weights of the reference"],
    ),
    "the reference's config": (
        lambda f: edit_json(f / "reference/config.json", rms_norm_eps=1e-3),
        ["the config.json of the reference"],
    ),
    "a chat template": (
        lambda f: (f / "model/chat_template.jinja").write_text("{{ messages }}"),
        ["the tokenizer of the model"],
    ),
    "the tokenizer": (
        lambda f: edit_json(f / "model/tokenizer_config.json", note="x"),
        ["the tokenizer of the model"],
    ),
    "the stop tokens": (
        lambda f: sampled_by(f / "model", eos_token_id=[2, 5]),
        ["the held-out pairs", "the stop tokens of the model", "the training pairs"],
    ),
    "other defaults for sampling": (
        lambda f: sampled_by(f / "model", temperature=0.5),
        [],
    ),
    "the order of the pairs": (
        lambda f: edit_pairs(f / "pairs.jsonl"),
        ["the training pairs"],
    ),
    "other pairs": (
        lambda f: make_pairs_file(f / "pairs.jsonl", seed=1),
        ["the held-out pairs", "the training pairs"],
    ),
    "no change": (lambda f: (f / "pairs.jsonl").touch(), []),
    "a README": (lambda f: (f / "model/README.md").write_text("new"), []),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_at_the_same_place(inputs, tmp_path, name):
    folder = shutil.copytree(inputs, tmp_path / "copy")
    shutil.copytree(folder / "model", folder / "reference")
    edit, expected = FILES[name]
    before = Provenance({}, names_of(folder))
    edit(folder)
    changed = differences(before, Provenance({}, names_of(folder)))
    assert [x.partition(" (")[0] for x in changed] == expected
    assert all(x.endswith(" has changed)") for x in changed)


def test_resuming_with_other_options_without_config_json(folder):
    """The checkpoints know what made them."""
    (folder / "run" / "config.json").unlink()
    changes = {
        "optimizer": other(learning_rate=2e-2),
        "objective": from_loss(losses.simpo, beta=1.0, gamma=0.5),
        "batch_size": 16,
    }
    config = config_for(folder, folder / "run", **changes)
    refused(
        config,
        "checkpoints: step 2 was made with other inputs",
        "batch_size (8 -> 16), loss.beta (2.0 -> 1.0), optimizer.learning_rate",
    )


def test_resuming_with_an_edited_model(folder):
    edit_json(folder / "model/config.json", rope_theta=5000.0)
    config = config_for(folder, folder / "run")
    refused(config, "the config.json of the model (", "another --out")


def test_checkpoints_of_another_run(folder, tmp_path):
    """Copied into a new folder, or over those of this run."""
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "new" / "checkpoints")
    (tmp_path / "new" / LOCK).touch()
    config = config_for(folder, tmp_path / "new", seed=7, max_steps=3)
    refused(config, "step 2 was made with other inputs", "seed (0 -> 7)")


def rename(checkpoints: Path) -> None:
    (checkpoints / "2").rename(checkpoints / "9")


def of_an_earlier_version(checkpoints: Path) -> None:
    for path in checkpoints.rglob("meta/metadata"):
        meta = json.loads(path.read_text())
        del meta["made_by"]
        meta["digest"] = digest_of_meta(meta)
        path.write_text(json.dumps(meta))


def without_a_digest(checkpoints: Path) -> None:
    for path in checkpoints.rglob("meta/metadata"):
        meta = json.loads(path.read_text())
        del meta["digest"]
        meta["data"]["steps"] = 3  # the run's length may change
        path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (rename, "step 9 is step 2 under another name"),
        (of_an_earlier_version, "saved by an earlier version"),
        (without_a_digest, "none of the checkpoints [2] can be restored"),
    ],
)
def test_checkpoints_that_are_not_what_they_seem(folder, change, fragment):
    change(folder / "run" / "checkpoints")
    refused(config_for(folder, folder / "run"), fragment)


def test_everything_may_be_moved(folder, tmp_path, monkeypatch):
    """Model, data (here also in another format) and OUT, without its config.json."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    shutil.move(folder / "model", place / "renamed model")
    shutil.move(folder / "run", place / "run")
    shutil.rmtree(place / "run" / "export")
    (place / "run" / "config.json").unlink()
    pairs = place / "renamed.jsonl.gz"
    pairs.write_bytes(gzip.compress((folder / "pairs.jsonl").read_bytes()))
    moved = config_for(
        folder, place / "run", model=str(place / "renamed model"), data=str(pairs)
    )
    monkeypatch.setattr("jaxpref.data.feed.Feed.draw", None)  # no step is made
    run(moved)
    assert (place / "run" / WEIGHTS).exists()
    stored = json.loads((place / "run" / "config.json").read_text())
    assert stored["data"] == str(pairs)


def test_an_extended_run_is_one_run(folder, tmp_path):
    run(config_for(folder, folder / "run", max_steps=4))
    run(config_for(folder, tmp_path / "whole", max_steps=4))
    assert (folder / "run" / WEIGHTS).read_bytes() == (
        tmp_path / "whole" / WEIGHTS
    ).read_bytes()
    steps = lambda out: [
        (x["step"], x["loss"]) for x in read_metrics(out / "metrics.jsonl")
    ]
    assert steps(folder / "run") == steps(tmp_path / "whole")
    assert json.loads((folder / "run/config.json").read_text())["max_steps"] == 4
    # Not shorter than what is done; 64 pairs are 8 steps an epoch.
    refused(config_for(folder, folder / "run"), "has already made 4 steps")
    epochs = config_for(folder, folder / "run", max_steps=None, epochs=0.25)
    refused(epochs, "has already made 4 steps")


def resumed(optimizer: OptimizerConfig, *, done: int, before: int, now: int):
    """Restores a checkpoint of `done` of `before` steps, in a run of `now` steps."""
    schedule_of = lambda steps: make_schedule(optimizer, steps)
    task = types.SimpleNamespace(
        abstract_state=lambda: None,
        steps=now,
        schedule=schedule_of(now),
        schedule_of=schedule_of,
        mesh=types.SimpleNamespace(shape={}),
        layout=types.SimpleNamespace(rounding=lambda: ""),
    )
    state = types.SimpleNamespace(step=jnp.int32(done))
    saved = {"steps": before, "rows": "", "environment": {}}
    checkpoints = types.SimpleNamespace(restore=lambda _: (state, saved))
    return begin.restore(task, checkpoints, Path("OUT"))


@pytest.mark.parametrize(
    ("decay", "warmup", "done", "before", "now", "fine"),
    [
        (Decay.CONSTANT, 0, 4, 4, 8, True),
        (Decay.CONSTANT, 4, 4, 4, 8, True),
        (Decay.CONSTANT, 0, 4, 8, 6, True),  # shorter than planned
        (Decay.CONSTANT, 0, 4, 8, 3, False),  # shorter than done
        (Decay.COSINE, 0, 4, 4, 4, True),
        (Decay.COSINE, 0, 4, 4, 8, False),
        (Decay.LINEAR, 0, 4, 4, 8, False),
        (Decay.LINEAR, 2, 4, 8, 9, False),
        (Decay.COSINE, 4, 4, 8, 16, True),  # only the warm-up is done
        (Decay.LINEAR, 6, 4, 8, 16, True),
        (Decay.COSINE, 0, 1, 8, 16, True),  # the first rate is the peak
    ],
)
def test_schedules_that_would_change_the_past(decay, warmup, done, before, now, fine):
    optimizer = OptimizerConfig(learning_rate=1e-3, decay=decay, warmup_steps=warmup)
    restore = lambda: resumed(optimizer, done=done, before=before, now=now)
    if fine:
        assert restore() is not None
        return
    with pytest.raises(InputError, match=f"OUT has (already )?made|{done} steps that"):
        restore()


@pytest.mark.slow
def test_a_failing_option_does_not_bind_out(folder, tmp_path):
    out = tmp_path / "new"
    wrong = config_for(folder, out, keep_best="min:eval_loss")
    with pytest.raises(InputError, match="hold some out"):
        run(wrong)
    assert not (out / "config.json").exists() and not (out / "export").exists()
    # What the message says to do is not refused; nor is anything else.
    options = data.DataOptions(max_length=64, heldout_fraction=0.2)
    right = config_for(
        folder, out, keep_best="min:eval_loss", options=options, max_steps=1
    )
    run(right)
    assert (out / "config.json").exists() and (out / WEIGHTS).exists()
    assert read_metrics(out / "metrics.jsonl")[0]["step"] == 0


@pytest.mark.slow
def test_out_is_bound_before_anything_is_saved(folder, tmp_path, monkeypatch):
    out = tmp_path / "new"

    def save(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxpref.runtime.checkpoints.Checkpoints.save", save)
    with pytest.raises(KeyboardInterrupt):
        run(config_for(folder, out))
    assert (out / "config.json").exists()
    refused(config_for(folder, out, seed=1), "another config", "seed (0 -> 1)")


def test_two_starts_at_once(folder, monkeypatch):
    monkeypatch.setattr("jaxpref.runtime.run_folder.PATIENCE", 0.0)
    with locked(folder / "run"):
        before = contents(folder / "run")
        with pytest.raises(InputError, match="is writing to it; wait until it ends"):
            run(config_for(folder, folder / "run"))
        assert contents(folder / "run") == before
