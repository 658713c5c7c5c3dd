"""Audits that judge pairs by the rewards of a reward model, too."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data
from jaxpref.data import DataOptions, ListSource
from jaxpref.errors import InputError
from jaxpref.evaluate import audit, audit_inputs
from jaxpref.evaluate.flips import auroc
from jaxpref.models import RewardModel
from jaxpref.models.folder import save
from tests.test_audit import records, run, write
from tests.tiny import make_model_folder, make_tokenizer, tiny_config, tiny_params

COUNT = 240


def tokens(folder, rows):
    """Prompt and answer of every answer, as a reward model reads them."""
    plan = data.make_splits(
        ListSource(rows),
        data.load_tokenizer(folder),
        DataOptions(max_length=64, heldout_fraction=0.0),
        whole_turns=True,
    )
    return [
        np.concatenate([plan.train.prompt(n), plan.train.completion(n, side)])
        for n in range(len(rows))
        for side in range(2)
    ]


def padded(sequences):
    """[answers, T] and the lengths; padded to the same width for every file."""
    out = np.zeros((len(sequences), 32), np.int32)
    for row, sequence in zip(out, sequences):
        row[: len(sequence)] = sequence
    return jnp.asarray(out), jnp.asarray([len(x) for x in sequences])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, a reward model that knows good words, and true rewards."""
    folder = tmp_path_factory.mktemp("rewards")
    make_model_folder(folder / "model")
    network = RewardModel(tiny_config())
    params = tiny_params(network)
    (folder / "reward").mkdir()
    make_tokenizer(folder / "reward")
    rows = records(COUNT)
    inputs, lengths = padded(tokens(folder / "reward", rows))
    hidden = np.asarray(network.hidden(params, inputs), float)
    last = hidden[np.arange(len(hidden)), lengths - 1]
    good = np.array([[-1, 1] if row["flip"] else [1, -1] for row in rows])
    ridge = last.T @ last + 0.1 * np.eye(last.shape[1])
    params["score"] = jnp.asarray(
        np.linalg.solve(ridge, last.T @ good.ravel())[:, None], jnp.float32
    )
    save(folder / "reward", network, params)
    rewards = np.asarray(network.rewards(params, inputs, lengths)).reshape(-1, 2)
    np.save(folder / "rewards.npy", rewards)
    return folder


def test_rewards_are_one_more_judge(folder, tmp_path):
    rows = records(COUNT)
    common = {"annotator_field": "worker", "features": str(folder / "features")}
    found = run(
        tmp_path, folder / "model", rows,
        reward_model=str(folder / "reward"), **common,
    )  # fmt: skip
    judges = found.summary["features"]
    assert list(judges) == ["length", "surface", "words", "states", "reward"]
    rewards = np.load(folder / "rewards.npy")
    margins = rewards[:, 0] - rewards[:, 1]
    flips = np.array([row["flip"] for row in rows])
    assert auroc(-margins, flips) > 0.9
    assert judges["reward"]["auroc"] == pytest.approx(auroc(-margins, flips), abs=0.02)
    assert judges["reward"]["weight"] > 0.2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["features"] == json.loads(json.dumps(judges))
    # Rewards are cached beside the features, and other rows need no new ones.
    stored = sorted((folder / "features").glob("*.npz"))
    widths = {np.load(path)["values"].shape[1] for path in stored}
    assert widths == {1, 2 * 16 + 1}
    again = run(
        tmp_path, folder / "model", rows[::-1],
        reward_model=str(folder / "reward"), out=str(tmp_path / "again"), **common,
    )  # fmt: skip
    assert sorted((folder / "features").glob("*.npz")) == stored
    assert again.summary["features"]["reward"]["weight"] == pytest.approx(
        judges["reward"]["weight"]
    )


def rewards_of(folder, rows, out, reward_model):
    """The rewards that an audit reads."""
    path = write(out / "pairs.jsonl", rows)
    config = audit.AuditConfig(
        data=str(path), model=str(folder / "model"), out=str(out / "out"),
        max_length=64, features=str(folder / "features"),
        reward_model=str(reward_model),
    )  # fmt: skip
    opened = audit_inputs.open_pairs(str(path), config, folder / "model", None)
    return audit_inputs.part_of(opened, config, folder / "model").rewards


def test_each_answer_gets_its_own_reward(folder, tmp_path):
    """Rewards are those of the model without padding; the first row has no pair."""
    same = {"prompt": "it", "chosen": " was", "rejected": " was"}
    rows = [same, *records(COUNT)]
    found = rewards_of(folder, rows, tmp_path, folder / "reward")
    expected = np.load(folder / "rewards.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_answers_that_a_short_context_cuts_to_the_same_get_equal_rewards(
    folder, tmp_path
):
    network = RewardModel(tiny_config(max_position_embeddings=16))
    (tmp_path / "short").mkdir()
    make_tokenizer(tmp_path / "short")
    save(tmp_path / "short", network, tiny_params(network))
    rows, beginning = records(12), " was good" * 10
    rows[3] |= {"chosen": f"{beginning} film", "rejected": f"{beginning} book"}
    first, second = rewards_of(folder, rows, tmp_path, tmp_path / "short").T
    assert first[3] == second[3] and (np.delete(first - second, 3) != 0).all()


def test_a_language_model_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="--reward-model .*holds a language model"):
        run(tmp_path, folder / "model", records(3), reward_model=str(folder / "model"))
    assert not list((tmp_path / "out").glob("*.jsonl"))
