"""What a file prefers: weights, intervals, and the features of a text."""

import csv
import io

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jaxpref.evaluate.preferences import (
    Labels,
    bradley_terry,
    differences,
    false_discoveries,
    preferences,
    preferences_csv,
    random_effects,
)
from jaxpref.evaluate.surface import MEANINGS, NAMES, describe_answers

LENGTH, BULLETS = NAMES.index("length"), NAMES.index("bullets")


def test_weights_and_robust_deviations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) + [0.3, 0.0, -0.2]
    clusters = np.arange(200) // 4
    found = bradley_terry(x, clusters)
    loss = lambda w: np.logaddexp(0, -x @ w).sum() + w @ w / 200
    best = scipy.optimize.minimize(loss, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(found.weight, best, atol=1e-5)
    # The sandwich, one label at a time.
    wrong = 1 / (1 + np.exp(x @ best))
    hessian = np.eye(3) / 100
    for row, p in zip(x, wrong):
        hessian += p * (1 - p) * np.outer(row, row)
    middle = np.zeros((3, 3))
    for cluster in range(50):
        score = sum(wrong[n] * x[n] for n in np.flatnonzero(clusters == cluster))
        middle += np.outer(score, score)
    cover = np.linalg.inv(hessian) @ middle @ np.linalg.inv(hessian) * 50 / 49
    np.testing.assert_allclose(found.deviation, np.sqrt(np.diag(cover)), rtol=1e-4)


def test_intervals_cover_the_weight_though_prompts_repeat():
    """Four copies of each label say as much as one; 300 data sets."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(300):
        x = rng.normal(size=(120, 1))
        x *= np.where(rng.random((120, 1)) < 1 / (1 + np.exp(-0.7 * x)), 1, -1)
        found = bradley_terry(np.repeat(x, 4, axis=0), np.repeat(np.arange(120), 4))
        inside += abs(found.weight[0] - 0.7) < 1.96 * found.deviation[0]
    assert 0.91 < inside / 300 < 0.98


def test_a_separated_feature_has_a_finite_weight():
    found = bradley_terry(np.ones((50, 1)), np.arange(50))
    assert np.isfinite(found.weight[0]) and found.weight[0] > 2


def test_strata_count_equally_if_they_differ():
    weight, deviation = random_effects(np.array([1.0, 3.0]), np.array([0.01, 0.02]))
    # The variance between them, 2, hides that of each.
    assert weight == pytest.approx(2, abs=0.01)
    assert deviation == pytest.approx(1, abs=0.01)
    weight, deviation = random_effects(np.array([1.0, 1.0]), np.array([1.0, 2.0]))
    assert weight == pytest.approx(1) and deviation == pytest.approx(0.8**0.5)


def test_false_discoveries_are_scipys():
    p = np.random.default_rng(2).random(30) ** 3
    expected = scipy.stats.false_discovery_control(p)
    np.testing.assert_allclose(false_discoveries(list(p)), expected)


def labels(count=800, seed=0):
    """Ann prefers long answers; bob, with a quarter of the labels, prefers lists."""
    rng = np.random.default_rng(seed)
    x = np.zeros((count, len(NAMES)))
    x[:, LENGTH] = rng.normal(size=count)
    x[:, BULLETS] = 0.7 * x[:, LENGTH] + rng.normal(size=count)
    bob = np.arange(count) % 4 == 0
    score = np.where(bob, 1.5 * x[:, BULLETS], 1.5 * x[:, LENGTH])
    x[rng.random(count) > 1 / (1 + np.exp(-score))] *= -1
    names = ["bob" if b else "ann" for b in bob]
    prompts = list(map(str, range(count)))
    return Labels(x, prompts, names, ["s"] * count)


def found_for(records, by, name, feature):
    return next(
        r
        for r in records
        if (r["by"], r["name"], r["feature"]) == (by, name, NAMES[feature])
    )


def test_annotators_have_weights_of_their_own():
    given = labels()
    records = preferences(given, given.differences[:, BULLETS])
    assert {r["by"] for r in records} == {"all labels", "annotator", "model"}
    assert len(records) == 4 * len(NAMES)
    both = found_for(records, "all labels", "", LENGTH)
    assert both["low"] < both["weight"] < both["high"] and both["q"] < 1e-6
    assert both["more"] == pytest.approx(np.mean(given.differences[:, LENGTH] > 0))
    ann = found_for(records, "annotator", "ann", LENGTH)
    assert ann["low"] < 1.5 < ann["high"] and ann["labels"] == 600
    # Alone, lists look preferred by ann, since they come with length; not beside it.
    lists = found_for(records, "annotator", "ann", BULLETS)
    assert lists["low"] > 0.3
    assert lists["joint_low"] < 0 < lists["joint_high"]
    own = found_for(records, "model", "log-prob per token", BULLETS)
    assert own["more"] == 1 and own["weight"] > 2
    unused = found_for(records, "all labels", "", NAMES.index("code"))
    assert unused["labels"] == 0 and unused["weight"] is None and unused["q"] == 1


def test_confounders_are_held_fixed():
    given = labels()
    zeros = np.zeros(800)
    records = preferences(given, zeros, confounders=["length"])
    assert found_for(records, "annotator", "ann", BULLETS)["low"] < 0.1
    assert found_for(records, "annotator", "bob", BULLETS)["low"] > 1
    # Annotators count equally when they disagree, whoever has the most labels.
    by_name = preferences(given, zeros, confounders=["length", "annotator"])
    means = [
        found_for(records, "annotator", n, BULLETS)["weight"] for n in ("ann", "bob")
    ]
    pooled = found_for(records, "all labels", "", BULLETS)["weight"]
    found = found_for(by_name, "all labels", "", BULLETS)["weight"]
    assert found == pytest.approx(np.mean(means), abs=0.1) and found > pooled + 0.1


def test_few_labels_and_the_spreadsheet():
    assert preferences(labels(20), np.zeros(20)) == []
    records = preferences(labels(80), np.zeros(80))
    assert all(r["joint"] is None for r in records)
    rows = list(
        csv.DictReader(io.StringIO(preferences_csv(records).decode("utf-8-sig")))
    )
    assert len(rows) == len(records) and rows[0]["meaning"] == MEANINGS["length"]
    assert float(rows[0]["weight"]) == pytest.approx(records[0]["weight"])


def test_differences_have_a_mean_square_of_one():
    described = np.random.default_rng(3).normal(size=(50, 2, 4))
    found = differences(described)
    np.testing.assert_allclose((found**2).mean(axis=0), 1)
    np.testing.assert_array_equal(
        np.sign(found), np.sign(-np.diff(described, axis=1)[:, 0])
    )


@pytest.mark.parametrize(
    "answer, feature, value",
    [
        ("one two three", "length", np.log(4)),
        ("One two. Three four!", "sentence_length", np.log(3)),
        ("a\n\nb\n\nc", "paragraphs", np.log(3)),
        ("- a\n- b\nc - d", "bullets", np.log(3)),
        ("1. a\n2) b\n3 c", "numbered", np.log(3)),
        ("## A\n#b", "headings", np.log(2)),
        ("**a** and __b__", "bold", np.log(3)),
        ("use `ls` and `cd`", "code", np.log(3)),
        ("|a|b|\n|--|--|", "tables", np.log(3)),
        ("see https://x.org and [1]", "citations", np.log(3)),
        ("1,000 of 3.5", "numbers", np.log(3)),
        ("why? how?", "questions", np.log(3)),
        ('"a" and “b”', "quotes", np.log(3)),
        ("perhaps I think so", "hedging", 200 / 24),
        ("I’m sorry, I can't", "refusal", 100 / 24),
        ("I'm sorry, I can’t", "apology", 100 / 24),
        ("as an air", "refusal", 0.0),
        ("for example cats, such as", "examples", 200 / 25),
        ("NASA and A", "capitals", 1 / 23),
        ("bake a cake", "copying", 2 / 23),
        ("the the", "variety", 1 / np.sqrt(2)),
        ("and then", "cut_off", 1.0),
        ("Done.", "cut_off", 0.0),
        ("", "reading_level", 0.0),
        ("The cat sat.", "reading_level", 0.39 * 3 + 11.8 - 15.59),
    ],
)
def test_features_of_a_text(answer, feature, value):
    (found,) = describe_answers([("How do I bake a pie?", answer)])
    assert found[NAMES.index(feature)] == pytest.approx(value)
