"""`jaxpref score --uncertainty`: whose features, which masks, and what is written."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit

from jaxpref import data, rewards
from jaxpref.cli.main import main
from jaxpref.models import RewardModel
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.noise import linear_head
from jaxpref.rewards import uncertainty
from tests.test_rewards import answered, score
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    make_tokenizer,
    tiny_config,
    tiny_params,
)

PAIRS = [
    {"prompt": "the film", "chosen": " is good", "rejected": " was a dull book"},
    {"prompt": "we", "chosen": " liked it always and again", "rejected": " hated it"},
]
LISTS = [
    {"prompt": "the book", "completions": [" is fine", "", " is great and warm"]},
    {"prompt": "we", "completions": [{"text": "ate"}, {"text": "saw"}]},
    {"prompt": "I", "completion": " saw it"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two reward models, and a file of pairs."""
    folder = tmp_path_factory.mktemp("models")
    network = RewardModel(tiny_config())
    for seed, name in enumerate(("one", "two")):
        (folder / name).mkdir()
        make_tokenizer(folder / name)
        save(folder / name, network, tiny_params(network, seed))
    make_pairs_file(folder / "fit.jsonl", 40)
    return folder


@functools.cache
def loaded(folder):
    """A compiled model, its tokenizer, and the weights of its head."""
    model = RewardModel(read_architecture(folder))
    params = load_params(folder, model)
    hidden = jax.jit(lambda tokens: model.hidden(params, tokens)[0])
    return hidden, data.load_tokenizer(folder), np.asarray(params["score"])[:, 0]


def features(folder, record):
    """The last hidden state of each answer of a pair, computed alone."""
    hidden, tokenizer, head = loaded(folder)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for side in ("chosen", "rejected"):
        text = ids(record["prompt"]) + ids(record[side])
        tokens = [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
        padded = jnp.array([tokens + [0] * (24 - len(tokens))])
        found.append(np.asarray(hidden(padded))[len(tokens) - 1])
    return np.array(found), head


def test_dropout_masks_are_those_of_the_pair(models, tmp_path):
    words = ["--model", str(models / "one"), "--uncertainty", "dropout"]
    words += ["--dropout-rate", "0.25", "--passes", "1000"]
    found = score(tmp_path, PAIRS, *words)
    for record, own in zip(PAIRS, found):
        states, head = features(models / "one", record)
        np.testing.assert_allclose(
            [own["chosen_score"], own["rejected_score"]], states @ head, atol=1e-5
        )
        terms = np.array([states[0] - states[1], *states]) * head
        spread = np.sqrt(0.25 / 0.75 * (terms**2).sum(1))
        stds = [
            own[x] for x in ("margin_std", "chosen_score_std", "rejected_score_std")
        ]
        np.testing.assert_allclose(stds, spread, rtol=4 / 1000**0.5)
    alone = score(tmp_path, PAIRS[::-1], *words, "--batch-size", "1")
    for own, other in zip(alone, found[::-1]):
        assert own["margin_std"] == pytest.approx(other["margin_std"], rel=1e-4)
        assert own["p_chosen"] == pytest.approx(other["p_chosen"], rel=1e-4)


def test_equal_answers_do_not_differ(models):
    """With a mask for each answer, they would: their rewards are uncertain."""
    word = str(models / "one")
    reward = rewards.reward_of(word, rewards.ModelOptions())
    head = uncertainty.load_head(reward)
    predict = uncertainty.by_dropout(head, rate=0.5, passes=20, seed=0)
    text = " never again"
    (found,) = predict(answered({"prompt": "a meal", "completions": [text, text]}))
    assert found.margin_std == 0 and found.p_chosen == 0.5
    assert found.std[0] == found.std[1] > 0.1


def test_laplace_is_fitted_to_the_pairs_of_a_file(models, tmp_path):
    words = ["--model", str(models / "one"), "--uncertainty", "laplace"]
    found = score(tmp_path, PAIRS, *words, "--fit-data", str(models / "fit.jsonl"))
    rows = map(json.loads, (models / "fit.jsonl").read_text().splitlines())
    differences = [np.subtract(*features(models / "one", row)[0]) for row in rows]
    states, head = zip(*(features(models / "one", record) for record in PAIRS))
    posterior = linear_head.laplace(np.array(differences), head[0])
    margins = np.array([x[0] - x[1] for x in states])
    variance = np.asarray(posterior.variance(margins))
    stds = [x["margin_std"] for x in found]
    np.testing.assert_allclose(stds, np.sqrt(variance), rtol=1e-3, atol=1e-6)
    expected = expit(margins @ head[0] / np.sqrt(1 + np.pi * variance / 8))
    np.testing.assert_allclose([x["p_chosen"] for x in found], expected, rtol=1e-4)
    centered = np.concatenate(states) - np.concatenate(states).mean(0)
    stds = [x[f"{side}_score_std"] for x in found for side in ("chosen", "rejected")]
    variance = posterior.variance(jnp.asarray(centered))
    np.testing.assert_allclose(stds, np.sqrt(variance), rtol=1e-3)


def test_an_ensemble_of_models_and_its_temperature(models, tmp_path):
    words = ["--reward", str(models / "one"), "--reward", str(models / "two")]
    words += ["--uncertainty", "ensemble"]
    fit = [json.loads(line) for line in (models / "fit.jsonl").open()]
    found = score(tmp_path, PAIRS + fit, *words)
    parts = np.array([list(x["rewards"].values()) for x in found])  # [N, models, 2]
    margins = parts[..., 0] - parts[..., 1]
    np.testing.assert_allclose(
        [x["chosen_score"] for x in found], parts[..., 0].mean(1), atol=1e-6
    )
    np.testing.assert_allclose(
        [x["margin_std"] for x in found], margins.std(1), atol=1e-6
    )
    p = expit(margins).mean(1)
    np.testing.assert_allclose([x["p_chosen"] for x in found], p, atol=1e-6)
    centered = parts - parts.mean((0, 2), keepdims=True)
    stds = [[x["chosen_score_std"], x["rejected_score_std"]] for x in found]
    np.testing.assert_allclose(stds, centered.std(1), atol=1e-5)
    heldout = ["--calibration-data", str(models / "fit.jsonl")]
    nll = lambda x: -log_expit(logit(p[2:]) / np.exp(x)).sum()
    temperature = np.exp(minimize_scalar(nll, bounds=(-6, 6), method="bounded").x)
    scaled = score(tmp_path, PAIRS, *words, *heldout)
    expected = expit(logit(p[:2]) / temperature)
    np.testing.assert_allclose([x["p_chosen"] for x in scaled], expected, atol=2e-3)


def test_resampled_heads_scatter(models, tmp_path):
    fit = ["--fit-data", str(models / "fit.jsonl"), "--passes", "5"]
    words = ["--model", str(models / "one"), "--uncertainty", "ensemble", *fit]
    one, two = (score(tmp_path, PAIRS, *words, "--seed", seed) for seed in "01")
    assert min(x["margin_std"] for x in one) > 0.01
    assert one[0]["margin_std"] != two[0]["margin_std"]


def test_records_of_other_kinds_have_standard_deviations(models, tmp_path):
    words = ["--model", str(models / "one"), "--uncertainty", "dropout"]
    chosen, sampled, single = score(tmp_path, LISTS, *words)
    assert [x is None for x in chosen["score_std"]] == [False, True, False]
    assert min(sampled["score_std"]) > 0
    assert single["score_std"] > 0 and "p_chosen" not in {*chosen, *single}


def test_pairs_of_certain_answers(tmp_path, capsys):
    texts, scores, stds = ["a", "b", "c", "d"], [1, 2, 3, 4], [0.1, 0.9, 0.2, None]
    lists = {"prompt": "p", "completions": texts, "scores": scores, "score_std": stds}
    objects = lists | {"completions": [{"text": text} for text in texts]}
    scored, out = tmp_path / "scored.jsonl", tmp_path / "pairs.jsonl"
    words = ["data", "pairs", "--data", str(scored), "--out", str(out), "--rule", "all"]
    for record in (lists, objects):
        scored.write_text(json.dumps(record) + "\n")
        main(words)
        assert len(out.read_text().splitlines()) == 6
        main([*words, "--max-std", "0.5"])
        (pair,) = map(json.loads, out.read_text().splitlines())
        assert pair["chosen"] == "c" and pair["rejected"] == "a"
        assert "score_std" not in pair
    scored.write_text(json.dumps(lists | {"score_std": None}) + "\n")
    with pytest.raises(SystemExit):
        main([*words, "--max-std", "0.5"])
    assert "scored.jsonl row 1: the scores have no standard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--passes", "5"], "--passes: only --uncertainty reads it"),
        (["--uncertainty", "laplace"], "--fit-data"),
        (["--uncertainty", "ensemble"], "--fit-data, or several rewards"),
        (["--uncertainty", "dropout", "--fit-data", "x"], "--fit-data: --uncertainty"),
        (["--uncertainty", "dropout", "--dropout-rate", "1"], "--dropout-rate 1"),
        (["--uncertainty", "dropout", "--reward", "rule:words"], "one reward model"),
        (["--uncertainty", "dropout", "--weights", "2"], "leave out --combine"),
    ],
)
def test_options_that_do_not_fit(models, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        score(tmp_path, PAIRS, "--model", str(models / "one"), *words)
    assert message in capsys.readouterr().err


def test_models_that_have_no_head(tmp_path, capsys):
    make_model_folder(tmp_path / "policy")
    log_ratio = f"log-ratio:{tmp_path / 'policy'}:{tmp_path / 'policy'}"
    with pytest.raises(SystemExit):
        score(tmp_path, PAIRS, "--reward", log_ratio, "--uncertainty", "dropout")
    assert "needs a reward model" in capsys.readouterr().err
