"""Runs on answers that are sampled in training: `jaxpref train --objective grpo`."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import arithmetic
from jaxpref import data, objectives
from jaxpref.cli import train as command
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.models.lora import LoraOptions
from jaxpref.online.options import SamplingOptions
from jaxpref.online.rewards import ZeroOrOne
from jaxpref.online.run import run
from jaxpref.online.stream import SampledStream
from jaxpref.rewards import RewardOptions
from jaxpref.rewards.answered import Answered
from jaxpref.train import Decay, MeshConfig, OptimizerConfig, TrainConfig, read_metrics
from tests.compiled import compiled
from tests.tiny import WORDS, make_model_folder

SAMPLING = SamplingOptions(group_size=4, max_new_tokens=6, sample_batch_size=32)
WEIGHTS = "export/model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and prompts of one to five words with the right answer."""
    made = tmp_path_factory.mktemp("online")
    make_model_folder(made / "model")
    rng = np.random.default_rng(0)
    with (made / "prompts.jsonl").open("w") as file:
        for n in range(24):
            words = [WORDS[n], *rng.choice(WORDS, rng.integers(0, 5))]
            row = {"prompt": " ".join(words), "answer": "good"}
            file.write(json.dumps(row) + "\n")
    return made


def config_for(folder: Path, out: Path, **changes) -> TrainConfig:
    defaults = dict(
        model=str(folder / "model"),
        data=str(folder / "prompts.jsonl"),
        out=str(out),
        objective=objectives.grpo(),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
        options=data.DataOptions(heldout_fraction=0.0),
        mesh=MeshConfig(data=8),
        max_steps=3,
        batch_size=8,
        save_every=9,
        log_every=1,
        logger=(),
    )
    return TrainConfig(**(defaults | changes))


GOOD = RewardOptions(reward=("rule:regex:good",))


def steps(out: Path) -> list[dict]:
    return [x for x in read_metrics(out / "metrics.jsonl") if "loss" in x]


def test_a_run_learns_what_is_rewarded(folder, tmp_path):
    """One program of each kind, although prompts and answers differ in length."""
    config = config_for(folder, tmp_path / "run", max_steps=25)
    with compiled("train_step") as trained, compiled("advance") as sampled:
        run(config, SAMPLING, GOOD)
    assert len(trained) == 1
    assert len(sampled) <= 3  # with fewer slots, when few answers are left
    found = steps(tmp_path / "run")
    rewards = [x["rewards/mean"] for x in found]
    assert np.mean(rewards[:5]) < 0.4 and np.mean(rewards[-5:]) > 0.9
    first = found[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and found[-1]["kl"] > 0.1
    # The advantages of a group add up to 0, and so do the losses while w = 1.
    assert first["loss"] == pytest.approx(0, abs=1e-5)
    assert all(x["clipped"] == 0 and x["logps/mismatch"] < 1e-3 for x in found)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [x["step"] for x in samples] == sorted([*range(1, 26)] * 4)
    for x in samples:
        assert x["reward"] == float("good" in x["output"])
    phases = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert {"sample", "reward", "score", "steps"} <= phases.keys()


class Killed(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize(
    ("updates", "rank"), [(2, None), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_a_killed_run_ends_with_the_same_bits(
    folder, tmp_path, monkeypatch, updates, rank
):
    """It is killed after step 4; its checkpoint, of step 3, is between two updates.

    With adapters, the base is the reference.
    """
    sampling = dataclasses.replace(SAMPLING, updates_per_sample=updates)
    config = lambda name: config_for(
        folder,
        tmp_path / name,
        objective=objectives.rloo(),
        lora=LoraOptions(rank=rank),
        # Six steps: an epoch is three samples of eight prompts.
        max_steps=None,
        epochs=2 / updates,
        save_every=3,
    )
    run(config("whole"), sampling, GOOD)
    draw = SampledStream.draw

    def killed(stream, state):
        if int(state.step) == 4:
            raise Killed
        return draw(stream, state)

    with monkeypatch.context() as patch:
        patch.setattr(SampledStream, "draw", killed)
        with pytest.raises(Killed):
            run(config("killed"), sampling, GOOD)
    run(config("killed"), sampling, GOOD)
    whole, resumed = (load_file(tmp_path / x / WEIGHTS) for x in ("whole", "killed"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name])
    texts = [(tmp_path / x / "samples.jsonl").read_bytes() for x in ("whole", "killed")]
    assert texts[0] == texts[1]
    keys = ("loss", "rewards/mean", "kl", "clipped", "ended", "logps/mismatch")
    whole, resumed = (
        [[x[k] for k in keys] for x in steps(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == resumed
    kls = [x["kl"] for x in steps(tmp_path / "whole")]
    assert kls[0] == pytest.approx(0, abs=1e-5) and kls[-1] > 1e-4
    assert rank is None or (tmp_path / "whole" / "adapter").exists()
    sampled = [x["rewards/mean"] for x in steps(tmp_path / "whole")]
    if updates == 2:  # two steps learn from the same answers
        assert sampled[0::2] == sampled[1::2]


@pytest.mark.slow
def test_layouts_give_the_same_losses(folder, tmp_path):
    """Packed rows share prompts; the answers and the losses are the same."""
    for name in ("auto", "none"):
        config = config_for(
            folder,
            tmp_path / name,
            row_length=name,
            objective=objectives.dapo(),
            max_steps=2,
        )
        run(config, SAMPLING, GOOD)
    one, other = (steps(tmp_path / name) for name in ("auto", "none"))
    for key in ("rewards/mean", "lengths", "grad_norm", "loss"):
        values = [[x[key] for x in found] for found in (one, other)]
        np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-5)


def test_the_command(folder, tmp_path, monkeypatch):
    """The second batch has one prompt of the first epoch and seven of the second."""
    rows = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(["{}\n", *rows[:9]]))
    argv = [
        *("--model", str(folder / "model"), "--data", str(tmp_path / "prompts.jsonl")),
        *("--out", str(tmp_path / "run"), "--objective", "reinforce", "--max-steps"),
        *("2", "--reward", "rule:exact", "--group-size", "4", "--max-new-tokens", "4"),
        *("--batch-size", "8", "--mesh.data", "8", "--overlong-buffer", "2"),
        *("--objective.beta", "0", "--learning-rate", "1e-3", "--log-samples", "8"),
        *("--log-every", "1", "--on-bad-row", "skip"),
    ]
    draw = SampledStream.draw

    def after_the_step(stream, state):
        """Its time is not counted as waiting for data."""
        assert all(x.is_ready() for x in jax.tree.leaves(state.params))
        return draw(stream, state)

    with monkeypatch.context() as patch:
        patch.setattr(SampledStream, "draw", after_the_step)
        command.command(argv)
    first = steps(tmp_path / "run")[0]
    assert first["baseline"] == 0 and "kl" not in first
    assert first["rewards/mean"] < 0  # long answers are penalized
    assert all(x["logps/mismatch"] < 1e-3 for x in steps(tmp_path / "run"))
    assert "row 1" in (tmp_path / "run" / "skipped_rows.jsonl").read_text()
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    outputs: dict[str, list] = {}
    for x in map(json.loads, samples[-8 * 4 :]):
        outputs.setdefault(x["id"], []).append(x["output"])
    (twice,) = (x for x in outputs.values() if len(x) == 8)
    assert twice[:4] != twice[4:]
    described = json.loads((tmp_path / "run" / "config.json").read_text())["loss"]
    assert described["name"] == "reinforce"
    assert described["sampling"]["group_size"] == 4
    assert described["rewards"]["reward"] == ["rule:exact"]
    changed = [x if x != "2" else "1" for x in argv]
    with pytest.raises(InputError, match="overlong_buffer"):
        command.command(changed)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    given = [
        *("--model", str(folder / "model"), "--data", str(folder / "prompts.jsonl")),
        *("--out", str(tmp_path / "run"), "--objective", "grpo"),
    ]
    short = ["--max-new-tokens", "6", "--reward", "rule:exact"]
    for more, message in (
        ([], "--reward: name at least one"),
        (["--loss", "dpo"], "--loss dpo: grpo learns from the rewards"),
        (["--reward", "rule:exact", "--group-size", "1"], "group_size"),
        (["--reward", "rule:exact", "--max-new-tokens", "999"], "128 positions"),
        (["--reward", "rule:exact", "--objective.clip-low", "2"], "clip_low 2.0"),
        (["--reward", "rule:exact", "--eval-data", "x.jsonl"], "--eval-data x.jsonl"),
        (["--reward", "rule:exact", "--eval-samples", "2"], "--eval-samples 2"),
        ([*short, "--answer-field", "x"], "row 1: field 'x' must"),
        ([*short, "--weights-field", "x"], "row 1: field 'x' must"),
        (
            ["--reward", "rule:exact", "--reward", "rule:words"]
            + ["--combine", "constrained", "--at-least", "2"],
            "--combine constrained: the answers of a step",
        ),
        (["--reward", "rule:exact", "--columns", "weight=w"], "--columns"),
    ):
        with pytest.raises(InputError, match=message):
            command.command([*given, *more])
    assert not (tmp_path / "run").exists()
    of_others = [*given[:-1], "reinforce", "--reward", "rule:exact"]
    with pytest.raises(InputError, match="--updates-per-sample 2: reinforce"):
        command.command([*of_others, "--updates-per-sample", "2"])
    rates = ["--objective.false-positive-rate", "0.1"]
    with pytest.raises(InputError, match="--overlong-buffer 2: --objective.false-pos"):
        command.command([*of_others, *rates, "--overlong-buffer", "2"])
    with pytest.raises(InputError, match="the reward 5, but only rewards of 0 and 1"):
        ZeroOrOne(lambda answered: [np.array([1.0, np.nan, 5.0])])(
            [Answered(Example("q", ()), {}, "f row 1")]
        )
    shutil.copy(folder / "prompts.jsonl", tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="give one file"):
        command.command(
            [*given, "--data", str(tmp_path / "other.jsonl"), "--reward", "rule:exact"]
        )


@pytest.mark.slow
def test_arithmetic_runs_from_its_command_to_its_results(tmp_path):
    protocol = arithmetic.Protocol(out=str(tmp_path / "out"), smoke=True)
    found = arithmetic.main(protocol)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("grpo", "rloo"):
        assert 0 <= found[name]["heldout"] <= 1
        assert [step for step, _ in found[name]["training"]] == [1, 3]
