"""The experiment on training on one's own answers: its table and its commands."""

from pathlib import Path

import numpy as np
import pytest

from experiments import own_samples
from experiments import own_samples_methods as methods
from jaxpref.cli import rounds

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
