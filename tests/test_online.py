"""Runs on answers that are sampled in training: `jaxpref train --objective grpo`."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import arithmetic, prompt_selection
from jaxpref import data, objectives
from jaxpref.cli import train as command
from jaxpref.cli.words import split
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
    """A tiny model, and prompts of one to five words with the right answer.

    24 to train on, with a rate of the verifier's errors, and 8 that are held out, which
    are longer.
    """
    made = tmp_path_factory.mktemp("online")
    make_model_folder(made / "model")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(32):
        longer = 6 if n >= 24 else 0
        words = [WORDS[n], *rng.choice(WORDS, longer + rng.integers(0, 5))]
        row = {"prompt": " ".join(words), "answer": "good", "e0": n / 100}
        rows.append(json.dumps(row) + "\n")
    (made / "prompts.jsonl").write_text("".join(rows[:24]))
    (made / "heldout.jsonl").write_text("".join(rows[24:]))
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


def evaluations(out: Path) -> dict[int, dict]:
    found = [x for x in read_metrics(out / "metrics.jsonl") if "eval_ended" in x]
    return {x["step"]: x for x in found}


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


def rloo_of_rates():
    """With the error rates of each prompt."""
    return objectives.rloo(false_positive_rate=objectives.PER_RECORD)


@pytest.mark.parametrize(
    ("make", "updates", "rank"),
    [
        (objectives.ppo_clip, 2, 2),
        pytest.param(rloo_of_rates, 2, None, marks=pytest.mark.slow),
        pytest.param(objectives.grpo, 1, 2, marks=pytest.mark.slow),
    ],
    ids=["ppo_clip", "rloo", "grpo-adapters"],
)
def test_a_killed_run_ends_with_the_same_bits(
    folder, tmp_path, monkeypatch, make, updates, rank
):
    """It is killed after step 4; its checkpoint, of step 3, is between two updates.

    Prompts are drawn by pass rates, which the checkpoint has, and with `grpo`, groups
    of equal rewards are replaced.  Only the resumed run evaluates step 3 twice.  With
    adapters, the base is the reference.
    """
    sampling = dataclasses.replace(
        SAMPLING,
        updates_per_sample=updates,
        prompt_target=0.5,
        prompt_candidates=2,
        resample_uniform=int(make is objectives.grpo),
        eval_group_size=4,
    )
    columns = ("false_positive_rate=e0",) if make is rloo_of_rates else ()
    config = lambda name: config_for(
        folder,
        tmp_path / name,
        objective=make(),
        options=data.DataOptions(heldout_fraction=0.0, columns=columns),
        eval_data=str(folder / "heldout.jsonl"),
        eval_every=3,
        keep_best="max:eval_rewards/mean",
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
    keys += ("draws", "prompts/answered") if make is objectives.grpo else ()
    whole, resumed = (
        [[x[k] for k in keys] for x in steps(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == resumed
    whole, resumed = (evaluations(tmp_path / name) for name in ("whole", "killed"))
    assert whole == resumed and whole.keys() == {0, 3, 6}
    assert whole[0]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert whole[6]["eval_kl"] > 1e-4
    best = json.loads((tmp_path / "killed" / "best.json").read_text())
    assert best["value"] == max(whole[n]["eval_rewards/mean"] for n in (3, 6))
    kls = [x["kl"] for x in steps(tmp_path / "whole")]
    assert kls[0] == pytest.approx(0, abs=1e-5) and kls[-1] > 1e-4
    assert rank is None or (tmp_path / "whole" / "adapter").exists()
    sampled = [x["rewards/mean"] for x in steps(tmp_path / "whole")]
    if make is objectives.ppo_clip:
        values = [x["values/mean"] for x in steps(tmp_path / "whole")]
        assert values[0] == 0 and values[-1] > 0  # the rewards are 0 or 1
        exported = load_file(tmp_path / "whole" / WEIGHTS)
        assert not {"weight", "bias"} & exported.keys()  # nor any other than these:
        assert all(name.startswith(("model.", "lm_head.")) for name in exported)
    if updates == 2:  # two steps learn from the same answers
        assert sampled[0::2] == sampled[1::2]


@pytest.mark.slow
def test_evaluations_leave_training_as_it_is(folder, tmp_path):
    """With prompts no longer than those of training, so that shapes are the same."""
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:16]))
    (tmp_path / "heldout.jsonl").write_text("".join(lines[16:]))
    for name in ("with", "without"):
        changes = {}
        if name == "with":
            changes = {"eval_data": str(tmp_path / "heldout.jsonl"), "eval_every": 1}
        config = config_for(
            folder, tmp_path / name, data=str(tmp_path / "train.jsonl"), **changes
        )
        run(config, SAMPLING, GOOD)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("with", "without"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    assert evaluations(tmp_path / "with").keys() == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("make", [objectives.dapo, objectives.ppo_clip])
def test_layouts_give_the_same_losses(folder, tmp_path, make):
    """Packed rows share prompts; the answers and the losses are the same."""
    for name in ("auto", "none"):
        config = config_for(
            folder,
            tmp_path / name,
            row_length=name,
            objective=make(),
            max_steps=2,
        )
        run(config, SAMPLING, GOOD)
    one, other = (steps(tmp_path / name) for name in ("auto", "none"))
    for key in ("rewards/mean", "lengths", "grad_norm", "loss"):
        values = [[x[key] for x in found] for found in (one, other)]
        np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-5)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    """The second batch has one prompt of the first epoch and seven of the second."""
    rows = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(["{}\n", *rows[:9], rows[0]]))
    argv = [
        *("--model", str(folder / "model")),
        *("--prompts", str(tmp_path / "prompts.jsonl")),
        *("--out", str(tmp_path / "run"), "--objective", "reinforce", "--max-steps"),
        *("2", "--reward", "rule:exact", "--group-size", "4", "--max-new-tokens", "4"),
        *("--batch-size", "8", "--mesh.data", "8", "--overlong-buffer", "2"),
        *("--objective.beta", "0", "--learning-rate", "1e-3", "--log-samples", "8"),
        *("--log-every", "1", "--on-bad-row", "skip"),
        *("--eval-data", str(folder / "heldout.jsonl"), "--eval-group-size", "4"),
    ]
    draw = SampledStream.draw

    def after_the_step(stream, state):
        """Its time is not counted as waiting for data."""
        assert all(x.is_ready() for x in jax.tree.leaves(state.params))
        return draw(stream, state)

    with monkeypatch.context() as patch:
        patch.setattr(SampledStream, "draw", after_the_step)
        command.command(argv)
    shown = capsys.readouterr().out
    assert "\nbest        2     " in shown
    assert "1 of 10 rows repeat a prompt, such as" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out reward: " in page and "max:eval_rewards/mean" in page
    first = steps(tmp_path / "run")[0]
    assert first["baseline"] == 0 and "kl" not in first
    assert first["rewards/mean"] < 0  # long answers are penalized, but in training only
    assert all(
        x["eval_rewards/mean"] >= 0 for x in evaluations(tmp_path / "run").values()
    )
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


def config_text(argv: list[str]) -> str:
    return command.config_text(split(argv, repeatable=("data", "logger", "reward")))


LOWER_BOUND = ["--reward", "rule:words", "--combine", "lower_bound"]


def test_what_does_not_fit_is_refused(folder, tmp_path):
    given = [
        *("--model", str(folder / "model"), "--data", str(folder / "prompts.jsonl")),
        *("--out", str(tmp_path / "run"), "--objective", "grpo"),
    ]
    short = ["--max-new-tokens", "6", "--reward", "rule:exact"]
    for more, message in (
        ([], "--reward: name at least one"),
        (["--loss", "dpo"], "--loss dpo: grpo learns from sampled answers"),
        (["--prompts", "x.jsonl"], "--prompts x.jsonl --data .*both name the prompts"),
        (["--reward", "rule:exact", "--group-size", "1"], "--group-size 1: grpo"),
        (["--reward", "rule:exact", "--group-size", "0"], "group_size"),
        (["--reward", "rule:exact", "--max-new-tokens", "999"], "128 positions"),
        (["--reward", "rule:exact", "--objective.clip-low", "2"], "clip_low 2.0"),
        ([*short, "--eval-data", "x.jsonl"], "x.jsonl"),
        (["--reward", "rule:exact", "--eval-every", "5"], "--eval-every 5: grpo"),
        (
            ["--reward", "rule:exact", "--keep-best", "max:eval_rewards/mean"],
            "--keep-best max:eval_rewards/mean: grpo evaluates only on the prompts",
        ),
        ([*short, "--eval-group-size", "2"], "--eval-group-size 2: grpo"),
        ([*short, "--prompt-candidates", "2"], "--prompt-candidates 2: only --prom"),
        (
            [*short, "--eval-data", str(folder / "prompts.jsonl")]
            + ["--answer-field", "x"],
            "row 1: field 'x' must",
        ),
        (["--reward", "rule:exact", "--eval-samples", "2"], "--eval-samples 2"),
        ([*short, "--answer-field", "x"], "row 1: field 'x' must"),
        ([*short, "--weights-field", "x"], "row 1: field 'x' must"),
        (
            ["--reward", "rule:exact", "--reward", "rule:words"]
            + ["--combine", "constrained", "--at-least", "2"],
            "--combine constrained: the answers of a step",
        ),
        (
            [*short, "--reward", "judge:x", "--prompt-target", "0.5"],
            "--prompt-target 0.5: --reward judge:x compares the answers of",
        ),
        (
            [*short, "--combine", "log_sigmoid", "--eval-data", "x.jsonl"],
            "--eval-data x.jsonl: --combine log_sigmoid compares",
        ),
        ([*short, *LOWER_BOUND, "--group-size", "2"], "--group-size 2: --combine low"),
        (
            [*short, *LOWER_BOUND, "--eval-data", "x.jsonl"],
            "--eval-group-size 1: --combine lower_bound needs at least 3 answers",
        ),
        (
            [*short, "--prompt-target", "1", "--prompt-candidates", "1"],
            "--prompt-candidates 1: --prompt-target chooses among",
        ),
        (
            [*short, "--prompt-target", "1", "--batch-size", "24"],
            "--prompt-target 1: a step answers .* 24 prompts, and there are only 24",
        ),
        (
            [*short, "--resample-uniform", "1", "--batch-size", "32"],
            "--resample-uniform 1: a step answers --batch-size 32 prompts",
        ),
        (["--reward", "rule:exact", "--columns", "weight=w"], "--columns"),
    ):
        with pytest.raises(InputError, match=message):
            command.command([*given, *more])
    assert not (tmp_path / "run").exists()
    file = tmp_path / "run.yaml"
    file.write_text(config_text([*given, *short]))
    line = ["--config", str(file), "--prompts", "other.jsonl"]
    assert "data: other.jsonl" in config_text(line)
    with pytest.raises(InputError, match="--objective grpo: needs --prompts FILE"):
        command.command([*given[:2], *given[4:], *short])
    plain = ["--model", "m", "--out", "o", "--data", "d", "--prompts", "x.jsonl"]
    with pytest.raises(InputError, match="this run reads records with answers"):
        command.command(plain)
    of_others = [*given[:-1], "reinforce", "--reward", "rule:exact"]
    with pytest.raises(InputError, match="--updates-per-sample 2: reinforce"):
        command.command([*of_others, "--updates-per-sample", "2"])
    with pytest.raises(InputError, match="reinforce also .* --objective dapo or grpo"):
        command.command([*of_others, "--resample-uniform", "2"])
    of_others[of_others.index("reinforce")] = "rloo"
    with pytest.raises(InputError, match="rloo also .* --objective.beta 0"):
        command.command([*of_others, "--resample-uniform", "2"])
    with pytest.raises(InputError, match="--promts: .*; did you mean --prompts"):
        command.command([*of_others, "--promts", "x"])
    with pytest.raises(InputError, match="row 1: no field 'v' for false_negative_rate"):
        command.command([*of_others, *short[:2], "--columns", "false_negative_rate=v"])
    rates = ["--columns", "false_positive_rate=e0"]
    with pytest.raises(InputError, match="--overlong-buffer 2: --columns false_pos"):
        command.command([*of_others, *rates, "--overlong-buffer", "2"])
    rates = ["--objective.false-positive-rate", "0.1"]
    with pytest.raises(InputError, match="--overlong-buffer 2: --objective.false-pos"):
        command.command([*of_others, *rates, "--overlong-buffer", "2"])
    with pytest.raises(InputError, match="lower_bound: --objective.false-positive"):
        command.command([*of_others, *rates, "--reward", "rule:words", *LOWER_BOUND])
    with pytest.raises(InputError, match="5, but only rewards .* leave out --rates$"):
        ZeroOrOne(lambda answered: [np.array([1.0, np.nan, 5.0])], ["--rates"])(
            [Answered(Example("q", ()), {}, "f row 1")]
        )
    shutil.copy(folder / "prompts.jsonl", tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="2 files with prompts, .* give one$"):
        command.command(
            [*given, "--data", str(tmp_path / "other.jsonl"), "--reward", "rule:exact"]
        )


def test_what_only_python_can_ask_for_is_refused(folder, tmp_path):
    options = data.DataOptions(heldout_fraction=0.0, columns=("weight=w",))
    config = config_for(folder, tmp_path, objective=objectives.rloo(), options=options)
    with pytest.raises(InputError, match="--columns weight=w: rloo does not read it"):
        run(config, SAMPLING, GOOD)
    with pytest.raises(InputError, match="prompt_target nan"):
        SamplingOptions(prompt_target=math.nan)


@pytest.mark.slow
def test_arithmetic_runs_from_its_command_to_its_results(tmp_path):
    protocol = arithmetic.Protocol(out=str(tmp_path / "out"), smoke=True)
    found = arithmetic.main(protocol)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("grpo", "rloo", "ppo_clip"):
        assert 0 <= found[name]["heldout"] <= 1
        assert [step for step, _ in found[name]["training"]] == [1, 3]


def test_the_steps_to_a_goal_by_hand():
    lines = [
        {"step": 0, "eval_rewards/mean": 0.5, "eval_ended": 1.0},
        {"step": 1, "loss": 0.1, "rewards/uniform": 0.5, "prompts/answered": 40.0},
        {"step": 2, "loss": 0.1, "rewards/uniform": 0.0, "prompts/answered": 32.0},
        {"step": 2, "eval_rewards/mean": 0.9, "eval_ended": 1.0},
        {"step": 3, "loss": 0.1, "rewards/uniform": 1.0, "prompts/answered": 64.0},
        {"step": 3, "eval_rewards/mean": 0.8, "eval_ended": 1.0},
    ]
    found = prompt_selection.summary(lines)
    assert found["reached"] == 2 and found["prompts"] == 72.0
    assert found["uniform"] == 0.25 and found["last"] == 0.8


@pytest.mark.slow
def test_prompt_selection_runs_from_its_command_to_its_results(tmp_path):
    protocol = prompt_selection.Protocol(
        out=str(tmp_path / "out"), smoke=True, prompts=200, wrong_answers=0.25
    )
    found = prompt_selection.main(protocol)
    path = tmp_path / "out" / "results_prompts_200_0.25.json"
    assert found.keys() == json.loads(path.read_text()).keys()
    for name in prompt_selection.ARMS:
        curve = found[name]["0"]["curve"]
        assert [step for step, _ in curve] == [0, 2, 3]
        assert curve[0] == found["in turn"]["0"]["curve"][0]
    rows = (tmp_path / "out" / "world" / "prompts_200_0.25.jsonl").read_text()
    assert 30 < rows.count("unknown") < 70
