"""The experiment on training on one's own answers: its table and its commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import arithmetic_rounds, own_samples
from experiments import own_samples_methods as methods
from jaxpref.cli import rounds
from tests.virtual import xla_flags

ARMS = {methods.LABELED: 0.0, "mine": 0.1}
"""The reward of each arm above the root of the KL."""


def test_rewards_are_compared_at_the_same_kl():
    records = [
        {"arm": arm, "seed": seed, "step": step, "malformed": 0.02 * step}
        | {"kl": kl, "reward": np.sqrt(kl) + (gain + 0.02 * seed) * (step > 0)}
        for arm, gain in ARMS.items()
        for seed in (0, 1)
        for step, kl in enumerate((0.0, 0.5, 1.21))
    ]
    found, gains = own_samples.tables(records, methods.LABELED)
    assert found.columns[-3:] == ["at KL 0.5", "at KL 1", "at KL 2"]
    first, second = found.rows
    assert first[0] == methods.LABELED and first[3] == "4.0%"
    assert first[1:3] == ["1.11 ± 0.01", "1.21 ± 0.00"]
    assert second[4] == "0.82 ± 0.01"
    assert first[6] == second[6] == "–"  # outside the measured range
    # The seeds differ by 0.02, but not the difference.
    assert gains.rows == [["mine", *["+0.10 (+0.10 to +0.10)"] * 2, "–"]]


@pytest.mark.parametrize(
    "recipe", own_samples.choose(own_samples.Options(full=True))[0].recipes
)
def test_the_commands_of_all_recipes_are_valid(recipe, tmp_path, capsys):
    made = methods.Inputs(
        *(Path(x) for x in ("labels", "few", "prompts", "reward", "weak"))
    )
    protocol = methods.Protocol()
    data = None
    if recipe == "spa":
        data = tmp_path / "few.jsonl"
        data.write_text("{}\n" * 40)
    words = methods.recipe_words(
        protocol, recipe, tmp_path / "out", Path("reference"), made, data, 0
    )
    rounds.command([*words, "--dry-run"])
    lines = capsys.readouterr().out
    assert lines.count("jaxpref train") >= protocol.rounds
    assert lines.count("--adam-eps 1.0") == lines.count("jaxpref train")
    assert lines.count(f"--max-steps {protocol.steps}") >= protocol.rounds
    assert lines.count("--max-steps 3 ") == (data is not None)  # three epochs of 40


def test_checkpoints_are_those_that_the_run_keeps():
    words = methods.kept(3, 12).split()
    options = dict(zip(words[::2], words[1::2]))
    assert options == {
        "--max-steps": "36",
        "--save-every": "12",
        "--keep-checkpoints": "3",
    }
    found = methods.checkpoints(Path("run"), 3, 12)
    assert [str(x) for x in found] == [f"run/checkpoints/{n}" for n in (12, 24, 36)]


def test_pass_rates_after_each_round():
    records = [
        {"arm": "mine", "seed": seed, "step": step, "reward": r + 0.02 * seed, "kl": r}
        for seed in (0, 1)
        for step, r in enumerate((0.25, 0.5, 0.75))
    ]
    protocol = arithmetic_rounds.Protocol(rounds=2)
    columns, row = arithmetic_rounds.table(protocol, records)
    assert len(columns) == len(row) == 3
    assert row[0] == "mine"
    assert row[1].startswith("0.510 ± 0.014, 0.50 ± 0.00 (")
    assert row[2].startswith("0.760 ± 0.014, 0.75 ± 0.00 (")


def test_the_least_kl_of_a_rate_of_right_answers():
    # The tilted distribution of a right and two wrong answers has the least KL.
    start = np.array([0.3, 0.5, 0.2])
    tilted = start * np.exp([2.0, 0.0, 0.0])
    tilted /= tilted.sum()
    kl = np.sum(tilted * np.log(tilted / start))
    assert arithmetic_rounds.least_kl(tilted[0], 0.3) == pytest.approx(kl)
    other = np.array([tilted[0], *(1 - tilted[0]) * np.array([0.9, 0.1])])
    assert np.sum(other * np.log(other / start)) > kl
    assert arithmetic_rounds.least_kl(1.0, 0.3) == pytest.approx(-np.log(0.3))


def ran(experiment: str, out: Path) -> None:
    """Runs a small experiment as a user would, on one device."""
    words = [sys.executable, "-m", f"experiments.{experiment}", "--smoke", "--out", out]
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_rounds_with_a_verifier_from_the_command_to_the_results(tmp_path):
    out = tmp_path / "out"
    ran("arithmetic_rounds", out)
    found = json.loads((out / "results.json").read_text())
    arms = ["offline DPO", "iterated DPO", "rejection sampling", "online DPO"]
    assert [x["arm"] for x in found if x["step"] == 0] == arms
    assert [x["step"] for x in found] == [0, 1, 2, 3] * 4
    for one in found:
        assert 0 <= one["reward"] <= 1
        assert (one["kl"] > 0) == (one["step"] > 0)


@pytest.mark.slow
def test_own_samples_from_the_command_to_the_report(tmp_path):
    out = tmp_path / "out"
    ran("own_samples", out)
    found = json.loads((out / "own_samples.json").read_text())
    arms = [methods.LABELED, methods.SAMPLED, methods.ITERATED]
    assert [x["arm"] for x in found if x["step"] == 0] == arms
    assert [x["step"] for x in found] == [0, 1, 2] * 3
    for one in found:
        assert np.isfinite(one["reward"]) and (one["kl"] > 0) == (one["step"] > 0)
    assert "data:image/png;base64," in (out / "own_samples.html").read_text()

    # Repeating the command trains and measures nothing.
    path = out / "seed-0" / "measured.json"
    before = path.stat().st_mtime_ns
    ran("own_samples", out)
    assert path.stat().st_mtime_ns == before
    assert json.loads((out / "own_samples.json").read_text()) == found
