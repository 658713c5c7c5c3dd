"""The experiments with small reward models of reviews."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import crm, reward_uncertainty
from experiments import review_rewards as models
from experiments.leaderboard_world import make_world

WORLD = make_world(8)


def test_pairs_are_shuffled_in_every_epoch():
    pairs = models.draw_pairs(WORLD, 0.4, 50, seed=1)
    assert 0.2 < pairs.is_flipped.mean() < 0.6
    found = models.shuffled(pairs, epochs=3, batch=16, seed=2)
    assert found["answers"].shape == (9, 16, 2)
    rows = {tuple(row) for row in pairs.answers.tolist()}
    epochs = found["answers"].reshape(3, 48, 2)
    assert all(tuple(row) in rows for row in epochs.reshape(-1, 2).tolist())
    assert not np.array_equal(epochs[0], epochs[1])


def test_accuracy_is_the_share_ranked_as_the_gold_reward():
    model = models.new_model(WORLD.features.shape[1], jax.random.key(0))
    answers = models.draw_pairs(WORLD, 0.0, 60, seed=3).answers
    gold = WORLD.rewards.ravel()[answers]
    layer = np.maximum(WORLD.features @ np.asarray(model["hidden"]), 0)  # no bias yet
    rewards = (layer @ np.asarray(model["head"]))[answers]
    differ = gold[:, 0] != gold[:, 1]
    right = (rewards[:, 0] > rewards[:, 1]) == (gold[:, 0] > gold[:, 1])
    found = models.accuracy(WORLD, model, jnp.asarray(answers))
    assert float(found) == pytest.approx(right[differ].mean())


@pytest.mark.slow
def test_crm_and_its_halves(tmp_path):
    options = crm.Options(smoke=True, out=str(tmp_path))
    crm.main(options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [x["method"] for x in results] == list(crm.METHODS)
    assert all(len(x["accuracy"]) == 2 for x in results)
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n") == 6 and "64 pairs, 40% flips" in table
    part = tmp_path / "parts" / "all_pairs-64-40.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"accuracy": [1, 0]}))
    crm.main(options)  # reads what is there
    assert "0.500 ± 0.707" in (tmp_path / "table.md").read_text()


def test_estimates_of_uncertainty(tmp_path):
    options = reward_uncertainty.Options(smoke=True, out=str(tmp_path))
    reward_uncertainty.main(options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [x["seed"] for x in results] == [0, 1]
    for result in results:
        for part in ("training", "held out", "errors"):
            assert set(result[part]) == set(result["log_loss"])
            numbers = [x for own in result[part].values() for x in own.values()]
            assert len(numbers) == 15 and 0 <= min(numbers) <= max(numbers) <= 1
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 15 and sum("| margin |" in x for x in lines) == 1
