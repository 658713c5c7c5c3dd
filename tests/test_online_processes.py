"""Answers sampled in training on two processes: the same run as on one."""

import concurrent.futures
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref.models import RewardModel
from jaxpref.models.folder import save
from jaxpref.train import read_metrics
from tests.test_processes import run_processes
from tests.tiny import (
    WORDS,
    make_model_folder,
    make_pairs_file,
    make_tokenizer,
    tiny_config,
    tiny_params,
)

WEIGHTS = "export/model.safetensors"
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
SMALL = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 1}
"""Of two devices; compiles faster."""
FIRST = {"reward": "tests.first_process:of_length"}
RUNS = {
    "hypo": {"objective": "hypo", "data": "pairs.jsonl", "max-length": 40},
    "adapters": {"objective": "rloo", "lora.rank": 2, **FIRST},
    "reward model": {
        "objective": "gpo_online",
        "reward": "reward",
        "accumulation": 2,
    },
    "padded": {"objective": "ppo_clip", "row-length": "none", **FIRST},
}
"""Variants, each with its own objective."""


def make_inputs(folder: Path) -> None:
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl", 16)
    rng = np.random.default_rng(0)
    for name, first, count in (("prompts", 0, 16), ("heldout", 16, 4)):
        rows = [
            {"prompt": " ".join([WORDS[first + n], *rng.choice(WORDS, n % 4)])}
            for n in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


def make_reward_folder(folder: Path) -> None:
    make_tokenizer(folder)
    model = RewardModel(tiny_config())
    save(folder, model, tiny_params(model))


def command(folder: Path, out: Path, **changes) -> list[str]:
    settings = {
        "model": "model",
        "prompts": "prompts.jsonl",
        "out": out,
        "objective": "grpo",
        "group-size": 4,
        "max-new-tokens": 6,
        "sample-batch-size": 16,
        "updates-per-sample": 2,
        "batch-size": 8,
        "max-steps": 4,
        "learning-rate": 1e-2,
        "decay": "constant",
        "log-every": 1,
        "save-every": 1,
        "keep-checkpoints": 9,
        **MESH,
        **changes,
    }
    if settings["objective"] == "hypo":
        del settings["prompts"]
    for name in ("model", "prompts", "data", "eval-data", "reward"):
        if (folder / str(settings.get(name))).exists():
            settings[name] = folder / settings[name]
    return ["train", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]


def run_in(
    folder: Path, runs: dict[str, dict], count: int, *, devices: int = 8
) -> list:
    out = folder / str(count)
    argvs = {k: command(folder, out / k, **v) for k, v in runs.items()}
    done = run_processes(folder, argvs, count, devices=devices)
    assert [code for code, *_ in done] == [0] * count, [x[2][-3000:] for x in done]
    return done


def on_both(folder: Path, runs: dict[str, dict]) -> list:
    """Runs them on two processes with a device each, and on one with two."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        two, _ = pool.map(lambda n: run_in(folder, runs, n, devices=2), (2, 1))
    return two


def check_equal(one: Path, two: Path, *, exactly: bool = False) -> None:
    """The same answers, and metrics and weights to rounding, or bit for bit."""
    for name in ("samples.jsonl", "eval_samples.jsonl"):
        found, expected = (
            [json.loads(line) for line in (run / name).open()]
            if (run / name).exists()
            else []
            for run in (two, one)
        )
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            # Sums of float32 in another order.
            assert a.pop("logp") == pytest.approx(b.pop("logp"), abs=1e-3)
            assert a == b
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (two, one))
    for a, b in zip(found, expected, strict=True):
        timed = {"tokens_per_second", "pairs_per_second", "data_wait_fraction"}
        for key in a.keys() - timed - {"logps/mismatch"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), (a, key)
    found, expected = (load_file(run / WEIGHTS) for run in (two, one))
    for name, array in expected.items():
        if exactly:
            np.testing.assert_array_equal(found[name], array)
        else:
            np.testing.assert_allclose(found[name], array, atol=5e-4)


@pytest.mark.slow
def test_each_of_two_processes_has_all_answers(tmp_path):
    """With the samples of one; the first one alone computes rewards and writes."""
    make_inputs(tmp_path)
    short = {"max-steps": 1, "updates-per-sample": 1, "objective.beta": 0}
    two = on_both(tmp_path, {"short": SMALL | short | {"log-samples": 8, **FIRST}})
    assert "export: " in two[0][1] and "export: " not in two[1][1]
    check_equal(tmp_path / "1" / "short", tmp_path / "2" / "short")
    assert len((tmp_path / "2" / "short" / "samples.jsonl").read_text()) > 8 * 4 * 50


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(tmp_path):
    """And a run of two that is killed between two updates ends with the same bits."""
    make_inputs(tmp_path)
    own = {"eval-data": "heldout.jsonl", "eval-every": 2, **FIRST}
    printed = run_in(tmp_path, {"whole": own}, 2)
    killed = tmp_path / "2" / "killed"
    shutil.copytree(tmp_path / "2" / "whole", killed)
    shutil.rmtree(killed / "export")
    for step in (4, 3, 2):
        shutil.rmtree(killed / "checkpoints" / str(step))
    run_in(tmp_path, {"killed": own}, 2)
    run_in(tmp_path, {"whole": own}, 1)
    check_equal(tmp_path / "1" / "whole", tmp_path / "2" / "whole")
    check_equal(tmp_path / "2" / "whole", killed, exactly=True)
    lines = (tmp_path / "2" / "whole" / "eval_samples.jsonl").open()
    assert [json.loads(x)["step"] for x in lines] == [0] * 4 + [2] * 4 + [4] * 4
    assert "export: " in printed[0][1] and "export: " not in printed[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_variants_on_two_processes_are_those_on_one(tmp_path, name):
    make_inputs(tmp_path)
    make_reward_folder(tmp_path / "reward")
    on_both(tmp_path, {name: SMALL | {"max-steps": 2} | RUNS[name]})
    check_equal(tmp_path / "1" / name, tmp_path / "2" / name)


@pytest.mark.slow
def test_a_verifier_that_fails_ends_every_process(tmp_path):
    make_inputs(tmp_path)
    argv = command(tmp_path, tmp_path / "run", reward="tests.first_process:failing")
    first, second = run_processes(tmp_path, {"run": argv}, 2)
    assert first[0] == 2 and second[0] != 0
    complaint = "--reward tests.first_process:failing: raised RuntimeError: out of"
    assert complaint in first[2]
