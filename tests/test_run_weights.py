"""Runs as models: their exports, and their checkpoints before there is an export."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.evaluation import run as evaluate
from jaxpref.evaluate.generations import SampleConfig
from jaxpref.evaluate.generations import run as sample
from jaxpref.evaluate.pairs import EvaluateConfig
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params
from jaxpref.models.lora import LoraOptions
from jaxpref.models.soft_prompt import SoftPromptOptions
from jaxpref.models.weights import Weights, load_weights
from jaxpref.objectives import crm, from_loss
from jaxpref.runtime.digests import digest_of_meta
from jaxpref.scoring.run_weights import reference_weights, run_weights
from jaxpref.train import OptimizerConfig, TrainConfig, read_metrics, run
from tests.test_training import mesh_of
from tests.tiny import make_model_folder, tiny_config

DPO = from_loss(losses.dpo)
LORA = LoraOptions(rank=2, dora=True)
SLOW = pytest.mark.slow


def config(inputs, out, **changes) -> TrainConfig:
    plain = dict(
        model=str(inputs / "model"),
        data=str(inputs / "pairs.jsonl"),
        out=str(out),
        objective=DPO,
        max_steps=1,
        batch_size=8,
        log_every=1,
        options=DataOptions(max_length=64, heldout_fraction=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    return TrainConfig(**plain | changes)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """A run of one step, with a checkpoint of that step and an export of it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(config(inputs, out))
    return out


@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    """The same before it has exported anything."""
    without = shutil.ignore_patterns("export")
    return shutil.copytree(finished, tmp_path / "run", ignore=without)


def equal(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **dict(rtol=0, atol=0) | tolerance)


@pytest.mark.parametrize("sizes", [(1, 4, 2), pytest.param((1, 1, 1), marks=SLOW)])
def test_a_checkpoint_is_what_is_exported_from_it(unfinished, finished, inputs, sizes):
    """Bit for bit, read to the shards of any mesh."""
    weights = run_weights(str(unfinished))
    assert weights == run_weights(str(unfinished / "checkpoints" / "1"))
    assert run_weights(str(finished)) == Weights(finished / "export")
    assert run_weights(str(inputs / "model")) is None
    base = Weights(inputs / "model")
    assert reference_weights("base", weights) == base
    with jax.set_mesh(mesh_of(*sizes)):
        model = build(tiny_config())
        found = load_weights(weights, model)
        expected = load_params(finished / "export", model)
        assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
        equal(found, expected)


@pytest.mark.slow
def test_training_refers_to_the_checkpoint(inputs, unfinished, finished, tmp_path):
    first = {}
    for name, reference in {"a": unfinished, "b": finished}.items():
        run(config(inputs, tmp_path / name, reference=str(reference)))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        first[name] = next(x["loss"] for x in lines if "loss" in x)
    assert first["a"] == first["b"] != pytest.approx(np.log(2), abs=1e-5)
    # Now that it has an export, the reference is another folder.
    shutil.copytree(finished / "export", unfinished / "export")
    with pytest.raises(InputError, match="the checkpoint of the reference .removed"):
        run(config(inputs, tmp_path / "a", reference=str(unfinished), max_steps=1))


def test_checkpoints_are_sampled_and_evaluated(inputs, unfinished, finished, tmp_path):
    model, pairs = str(inputs / "model"), str(inputs / "pairs.jsonl")
    margins, answers = [], []
    for name, path in {"a": unfinished, "b": finished / "export"}.items():
        options = dict(model=model, data=pairs, out=str(tmp_path / name))
        found = evaluate(EvaluateConfig(**options, reference=str(path)))
        margins.append(found["rewards/margins"])
        options = dict(prompts=("the film",), max_new_tokens=4)
        (answer,) = sample(SampleConfig(model=str(path), **options))
        answers.append((answer["output"], answer["logp"]))
    assert margins[0] == margins[1] != 0
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"lora": LORA}, {"train": "last:1"}, {"lora": LoraOptions(rank=2, base="nf4")}],
    ids=["dora", "last", "nf4"],
)
def test_what_a_run_trains_is_joined_with_what_it_began_with(inputs, tmp_path, changes):
    made = tmp_path / "run"
    run(config(inputs, made, **changes))
    weights = run_weights(str(made / "checkpoints" / "1"))
    model, tokens = build(tiny_config()), np.arange(24).reshape(2, 12)
    found = model.logits(load_weights(weights, model), tokens)
    expected = model.logits(load_params(made / "export", model), tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    base = model.logits(load_params(inputs / "model", model), tokens)
    assert np.abs(np.asarray(expected - base)).max() > 1e-3
    (answer,) = sample(
        SampleConfig(
            model=str(weights.saved.step), prompts=("the",), max_new_tokens=3, top_k=1
        )
    )
    (other,) = sample(
        SampleConfig(
            model=str(made / "export"), prompts=("the",), max_new_tokens=3, top_k=1
        )
    )
    assert answer["output"] == other["output"]


@pytest.mark.slow
def test_a_reward_model_in_a_checkpoint_is_evaluated(inputs, tmp_path):
    made = tmp_path / "run"
    run(config(inputs, made, objective=from_loss(losses.bradley_terry), lora=LORA))
    step = str(made / "checkpoints" / "1")
    data, out = str(inputs / "pairs.jsonl"), tmp_path / "evaluated"
    one, other = (
        evaluate(EvaluateConfig(model=path, data=data, out=str(out)))
        for path in (step, str(made / "export"))
    )
    assert one == pytest.approx(other, abs=1e-5)
    model = RewardModel(tiny_config())
    assert load_weights(run_weights(step), model)["score"].shape == (16, 1)
    with pytest.raises(InputError, match="trains a reward model; name a"):
        reference_weights(step, Weights(inputs / "model"))
    with pytest.raises(InputError, match="which writes no text"):
        sample(SampleConfig(model=step, prompts=("the",)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective": crm(losses.dpo, noise_rate=0.1)}, "trains two models"),
        ({"soft_prompt": SoftPromptOptions(length=2)}, "trains a soft prompt"),
    ],
    ids=["twins", "soft"],
)
def test_runs_of_other_kinds_are_named(inputs, tmp_path, changes, words):
    run(config(inputs, tmp_path / "run", **changes))
    with pytest.raises(InputError, match=words):
        run_weights(str(tmp_path / "run" / "checkpoints" / "1"))


def change_meta(run: Path, change) -> None:
    """Changes a checkpoint's metadata, and their digest with them."""
    path = run / "checkpoints" / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta | {"digest": digest_of_meta(meta)}))


def test_what_cannot_be_read_is_named(unfinished, inputs, tmp_path):
    def refused(words, name=unfinished):
        with pytest.raises(InputError, match=words):
            with jax.set_mesh(mesh_of(1, 1, 1)):
                load_weights(run_weights(str(name)), build(tiny_config()))

    def with_config(**changes):
        path = unfinished / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        return lambda: path.write_text(before)

    back = with_config(lora={"depth": 3})
    refused("was written by another version")
    back()
    back = with_config(model=str(tmp_path / "moved"))
    refused("moved: no such folder")
    back()
    other = make_model_folder(tmp_path / "other", seed=1, rope_theta=500.0)
    back = with_config(model=str(other))
    refused("the config.json of .*other has changed since the run began")
    back()
    back = with_config(lora=dataclasses.asdict(LORA))
    refused("its params cannot be read")
    back()

    def damage(meta):
        meta["digests"][".params['embed']"] ^= 1

    change_meta(unfinished, damage)
    refused(r"is damaged: .params\['embed'\] differs from what was saved")
    (unfinished / "checkpoints" / "1" / "meta" / "metadata").write_text("{}")
    refused("not a readable checkpoint .its metadata are incomplete")
    shutil.rmtree(unfinished / "checkpoints" / "1")
    refused("no export and no checkpoint yet")
    (unfinished / "config.json").unlink()
