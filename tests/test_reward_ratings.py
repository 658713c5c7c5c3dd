"""Ratings of attributes: regression, evaluation, scores, and the step to a reward."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxpref import data, losses, report, rewards
from jaxpref.cli.train import config_of, config_text
from jaxpref.cli.words import split
from jaxpref.data import DataOptions, ListSource, RecordOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.evaluation import run as evaluate
from jaxpref.evaluate.pairs import EvaluateConfig
from jaxpref.models import RewardModel
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_head
from jaxpref.models.reward import reward_model
from jaxpref.models.reward_head import Head, HeadOptions
from jaxpref.objectives import attribute_regression, from_loss
from jaxpref.train import Decay, OptimizerConfig, run
from tests.test_reward_heads import GPM, config
from tests.tiny import make_model_folder, make_pairs_file, tiny_config, tiny_params

NAMES = "helpful", "short", "kind"


def rated_file(path, count=24):
    """Single answers, of which some ratings are absent or null."""
    rng = np.random.default_rng(1)
    words = np.array("a film good bad great dull fine warm".split())
    records = []
    for n in range(count):
        text = " ".join(rng.choice(words, rng.integers(2, 6)))
        rating = {"helpful": int(rng.integers(0, 5)), "short": 1.5 * (n % 3)}
        if n % 4 == 0:
            rating["short"] = None
        records.append({"prompt": f"I saw {n}", "completion": f" {text}", **rating})
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return records


def write_page(path, metrics):
    about = {"model": "m", "data": "d", "command": "c"}
    report.write_evaluation(path, metrics, [], [], **about)
    return path.read_text()


def lines_of(folder, name):
    return [json.loads(x) for x in (folder / name).read_text().splitlines()]


def test_ratings_are_evaluated_by_attribute_and_by_their_weighted_sum(tmp_path):
    model = RewardModel(tiny_config(), head=Head(attributes=NAMES))
    params = tiny_params(model)
    folder = make_model_folder(tmp_path / "model")
    save(folder, model, params)
    records = rated_file(tmp_path / "rated.jsonl")
    asked = dict(model=str(folder), max_length=32)
    options = dict(asked, data=str(tmp_path / "rated.jsonl"), out=str(tmp_path / "a"))
    found = evaluate(EvaluateConfig(**options, kind="rated"))
    lead = write_page(tmp_path / "page.html", found)
    assert f"helpful {found['helpful/pearson']:.2f}" in lead
    with pytest.raises(InputError, match="--by: compares accuracies"):
        evaluate(EvaluateConfig(**options, kind="rated", by=("helpful",)))
    lines = lines_of(tmp_path / "a", "eval_ratings.jsonl")
    for name in ("helpful", "short"):
        rated = [n for n, x in enumerate(records) if x[name] is not None]
        given = np.array([records[n][name] for n in rated], float)
        predicted = np.array([lines[n]["predicted"][name] for n in rated])
        assert [lines[n]["ratings"][name] for n in rated] == given.tolist()
        assert found[f"{name}/ratings"] == len(rated)
        expected = np.abs(predicted - given).mean()
        np.testing.assert_allclose(found[f"{name}/mae"], expected, rtol=1e-6)
        centered = [x - x.mean() for x in (predicted, given)]
        correlation = np.prod(centered, 0).sum() / np.prod(
            [np.sqrt((x**2).sum()) for x in centered]
        )
        np.testing.assert_allclose(found[f"{name}/pearson"], correlation, rtol=1e-5)
    assert not any(name.startswith("kind") for name in found)

    answered = rewards.read_answered(ListSource(records), RecordOptions())
    of = lambda word: rewards.reward_of(word, rewards.ModelOptions())
    scores = np.ravel(of(f"attribute:short:{folder}")(answered))
    predicted = [line["predicted"]["short"] for line in lines]
    np.testing.assert_allclose(scores, predicted, atol=1e-5)
    with pytest.raises(InputError, match="predicts ratings of helpful, short, kind; n"):
        of(str(folder))
    with pytest.raises(InputError, match="attribute:long:.* predicts ratings of help"):
        of(f"attribute:long:{folder}")

    pairs_file = make_pairs_file(tmp_path / "pairs.jsonl", 8)
    options = dict(asked, data=str(pairs_file), out=str(tmp_path / "b"))
    weights = "helpful=1", "kind=-0.5"
    evaluate(EvaluateConfig(**options, attribute_weights=weights))
    for line in lines_of(tmp_path / "b", "eval_pairs.jsonl"):
        part = {
            name: line[f"{name}_chosen"] - line[f"{name}_rejected"] for name in NAMES
        }
        expected = part["helpful"] - 0.5 * part["kind"]
        np.testing.assert_allclose(line["margin"], expected, atol=1e-6)
    for message, changes in (
        ("say what each counts, as in --attribute-weights helpful=1", {}),
        ("--attribute-weights long=1: the model predicts helpful, short, kind",
         {"attribute_weights": ("long=1",)}),
        ("--attribute-weights kind=x: expected a number",
         {"attribute_weights": ("kind=x",)}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            evaluate(EvaluateConfig(**options, **changes))


def test_a_rating_becomes_a_reward_with_its_head(tmp_path):
    """HelpSteer2-Preference: regression, then scaled Bradley-Terry from its model."""
    folder = make_model_folder(tmp_path / "model")
    rated_file(tmp_path / "rated.jsonl")
    objective = attribute_regression(attributes=("short",))
    small = dict(max_steps=1, batch_size=8, save_every=1)
    regression = run(
        config(folder, tmp_path / "rated.jsonl", tmp_path / "one", objective, **small)
    )
    assert read_head(regression) == Head(attributes=("short",))
    pairs_file = tmp_path / "pairs.jsonl"
    rows = [json.loads(x) for x in make_pairs_file(pairs_file, 8).open()]
    pairs_file.write_text(
        "".join(json.dumps(x | {"strength": n % 3}) + "\n" for n, x in enumerate(rows))
    )
    options = DataOptions(
        max_length=32, heldout_fraction=0.0, columns=("strength=strength",)
    )
    still = OptimizerConfig(learning_rate=1e-9, decay=Decay.CONSTANT)
    export = run(
        config(
            regression,
            pairs_file,
            tmp_path / "two",
            from_loss(losses.scaled_bradley_terry),
            **small,
            options=options,
            optimizer=still,
        )
    )
    assert read_head(export) == Head()
    kept, trained = (load_params(x, reward_model(x)) for x in (regression, export))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), trained, kept
    )
    fresh = load_params(folder, reward_model(export), jax.random.key(0))
    assert abs(kept["score"] - fresh["score"]).max() > 1e-3
    other = config(regression, pairs_file, tmp_path / "three", GPM)
    with pytest.raises(
        InputError, match="with ratings of short, but this run trains a"
    ):
        run(other)
    wrong = attribute_regression(attributes=("short", "tall"))
    with pytest.raises(InputError, match="no training record has a number in field 't"):
        run(config(folder, tmp_path / "rated.jsonl", tmp_path / "four", wrong))


def test_objective_of_ratings():
    objective = attribute_regression(attributes=("a,b",))
    assert objective.scores == {"attributes"} and objective.kind.sides == 1
    assert objective.numbers == {"rating.a", "rating.b"}
    assert objective.kind.columns({"rating.b": "x.y"}) == {
        "rating.a": "a",
        "rating.b": "x.y",
    }
    for names in ((), ("a", "a")):
        with pytest.raises(InputError, match="name one or more, each once"):
            attribute_regression(attributes=names)


def test_rows_of_helpsteer2_and_their_options():
    row = {"prompt": "q", "response": "a", "helpfulness": 4, "verbosity": 1}
    asked = RecordOptions(fields=("completion=response",))
    (example,) = data.examples_of([row], asked, sides=1)
    assert example.completions == ("a",)
    with pytest.raises(InputError, match="completion=response with --loss attribute_r"):
        data.examples_of([row], RecordOptions(), sides=1)
    words = "--loss attribute_regression --loss.attributes helpfulness,verbosity"
    words += " --columns rating.verbosity=long --head.kind mlp"
    given = split([*"--model m --data d --out o".split(), *words.split()])
    made = config_of(given)
    assert made.objective.numbers == {"rating.helpfulness", "rating.verbosity"}
    assert made.options.named_columns == {"rating.verbosity": "long"}
    assert made.head == HeadOptions(kind="mlp")
    text = config_text(given)
    assert "kind: mlp" in text and "helpfulness,verbosity" in text
    wrong = [*"--model m --data d --out o --columns rating.short=x".split()]
    with pytest.raises(InputError, match="rating.short=x: .*dpo does not read it"):
        config_of(split(wrong))
    noisy = "--loss general_preference --correct unbiased --correct.flip-rate 0.2"
    made = config_of(split([*"--model m --data d --out o".split(), *noisy.split()]))
    assert made.objective.scores == {"embeddings"}
