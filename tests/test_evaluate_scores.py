"""CHES scores of `jaxpref evaluate`, and scores stored for later evaluations."""

import json

import jax
import numpy as np
import pytest

from jaxpref import data
from jaxpref.cli import evaluate as evaluate_command
from jaxpref.cli.options import parse
from jaxpref.cli.words import split
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.evaluate import evaluation, pairs
from jaxpref.evaluate.groups import equal_bins
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.scoring import score_tables
from tests.tiny import make_model_folder, make_pairs_file, tiny_config, tiny_params


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A language model, another one, a reward model, and 20 pairs."""
    folder = tmp_path_factory.mktemp("scores")
    for name, seed in (("lm", 0), ("other", 1)):
        make_model_folder(folder / name, seed, num_layers=1)
    model = RewardModel(tiny_config(num_layers=1))
    save(folder / "reward", model, tiny_params(model), folder / "lm")
    make_pairs_file(folder / "pairs.jsonl", 20)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loaded(monkeypatch):
    """The folders of the models that were loaded."""
    found, load = [], pairs.load_weights

    def counting(weights, model):
        found.append(weights.folder.name)
        return load(weights, model)

    monkeypatch.setattr(pairs, "load_weights", counting)
    return found


def evaluate(inputs, out, *flags, model="lm", file="pairs.jsonl"):
    """What the command writes, without its page."""
    words = f"--model {inputs / model} --data {inputs / file} --out {out}"
    words += f" --max-length 64 --batch-size 8 {' '.join(map(str, flags))}"
    config = parse(evaluate_command.PARTS, split(words.split()), command="").config
    evaluation.run(config)
    lines = (out / "eval_pairs.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), [*map(json.loads, lines)]


def test_ches_is_of_the_states_that_predict_the_answers(inputs, tmp_path):
    metrics, lines = evaluate(inputs, tmp_path, "--by ches-bin")
    model = build(read_architecture(inputs / "lm"))
    params, hidden_of = load_params(inputs / "lm", model), jax.jit(model.hidden)
    read = data.make_splits(
        data.open_source(str(inputs / "pairs.jsonl")),
        data.load_tokenizer(inputs / "lm"),
        DataOptions(max_length=64, heldout_fraction=0.0),
    ).train
    plain, normalized = [], []
    for n in range(20):
        sums, means = [], []
        for side in range(2):
            start, answer = len(read.prompt(n)), read.completion(n, side)
            tokens = np.concatenate([read.prompt(n), answer])
            padded = np.pad(tokens, (0, 64 - len(tokens)))[None]
            hidden = np.asarray(hidden_of(params, padded)[0], np.float64)
            states = hidden[start - 1 : len(tokens) - 1]
            sums.append(states.sum(axis=0))
            means.append(states.mean(axis=0))
        plain.append(sums[0] @ sums[1] - sums[0] @ sums[0])
        normalized.append(means[0] @ means[1] - means[0] @ means[0])
    close = dict(rtol=1e-4, atol=1e-4)  # float32 sums of up to ten states
    np.testing.assert_allclose([x["ches"] for x in lines], plain, **close)
    found = [x["normalized_ches"] for x in lines]
    np.testing.assert_allclose(found, normalized, **close)
    assert metrics["ranking/ches"] == pytest.approx(np.mean(plain), rel=1e-4)
    assert metrics["ranking/normalized_ches"] == pytest.approx(np.mean(found))
    # Four pairs in each bin, by rank.
    bins = np.argsort(np.argsort(normalized)) // 4
    hits = np.array([x["correct"] for x in lines])
    assert [x["accuracy"] for x in metrics["by"]["ches-bin"].values()] == [
        hits[bins == n].mean() for n in range(5)
    ]


def test_bins_of_equal_counts():
    found = equal_bins(np.array([5.0, 1, 2, 3, 4, 6, 7, 8, 9, 10]))
    assert found[:3] == ["5 to 6", "1 to 2", "1 to 2"]
    assert len(set(found)) == 5
    assert equal_bins(np.array([1.0, 1, 1, 2])) == [*["1 to 1"] * 3, "2 to 2"]
    close = equal_bins(1 + np.arange(5) / 10_000)
    assert close == [f"{x} to {x}" for x in ("1", *(f"1.000{n}" for n in range(1, 5)))]


def test_a_reward_model_has_no_ches_scores(inputs, tmp_path):
    with pytest.raises(InputError, match="only pairs have CHES scores"):
        evaluate(inputs, tmp_path, "--by ches-bin", model="reward")
    metrics, lines = evaluate(inputs, tmp_path, model="reward")
    assert not any("ches" in name for name in {*metrics, *lines[0]})


@pytest.mark.parametrize(
    ("model", "flags", "models"),
    [("lm", ("--reference", "other"), ["lm", "other"]), ("reward", (), ["reward"])],
)
def test_a_second_evaluation_loads_no_model(
    inputs, tmp_path, loaded, monkeypatch, model, flags, models
):
    monkeypatch.chdir(inputs)
    first = evaluate(inputs, tmp_path / "a", *flags, model=model)
    assert sorted(loaded) == models
    loaded.clear()
    # The scores are of answers, whatever the labels and the order.
    rows = (inputs / "pairs.jsonl").read_text().splitlines()
    swapped = [json.loads(x) for x in reversed(rows)]
    for row in swapped[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (inputs / "swapped.jsonl").write_text("\n".join(map(json.dumps, swapped)))
    assert evaluate(inputs, tmp_path / "b", *flags, model=model) == first
    _, lines = evaluate(
        inputs, tmp_path / "c", *flags, model=model, file="swapped.jsonl"
    )
    assert loaded == []
    signs = np.resize([-1, 1], 20)[::-1]
    assert [x["margin"] for x in lines[::-1]] == [
        sign * x["margin"] for sign, x in zip(signs, first[1])
    ]


def test_scores_of_another_model_are_not_used(inputs, tmp_path, loaded):
    first, _ = evaluate(inputs, tmp_path / "a")
    second, _ = evaluate(inputs, tmp_path / "b", model="other")
    assert loaded == ["lm", "other"] and first["logps/chosen"] != second["logps/chosen"]
    evaluate(inputs, tmp_path / "c", "--compute-dtype", "bfloat16")
    assert loaded == ["lm", "other", "lm"]


def test_only_new_answers_are_scored(inputs, tmp_path, monkeypatch):
    evaluate(inputs, tmp_path / "a")
    rows = (inputs / "pairs.jsonl").read_text().splitlines()
    row = json.loads(rows[3])
    row["rejected"] = row["rejected"].split()[0]
    (inputs / "more.jsonl").write_text("\n".join([*rows, json.dumps(row)]))
    said = []
    monkeypatch.setattr(score_tables, "log", said.append)
    evaluate(inputs, tmp_path / "b", file="more.jsonl")
    assert said == ["model log-probs (pairs): 20 cached, 1 to compute"]


def test_a_cache_that_cannot_be_written_costs_time_only(
    inputs, tmp_path, monkeypatch, caplog
):
    first = evaluate(inputs, tmp_path / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "file" / "cache"))
    rows = (inputs / "pairs.jsonl").read_text().splitlines()
    (inputs / "twice.jsonl").write_text("\n".join([*rows, rows[0]]))
    second = evaluate(inputs, tmp_path / "b", file="twice.jsonl")
    assert second[1][:20] == first[1]
    assert second[1][20]["margin"] == first[1][0]["margin"]
    assert "later runs will compute these scores again" in caplog.text
