"""Accuracy, calibration, and intervals, against definitions and scipy."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from jaxpref import evaluate

MARGINS = np.array([2.0, 0.5, 0.0, -0.1, -3.0, 1e4, -1e4, 0.5])


def test_ties_count_half_in_the_accuracy():
    assert evaluate.accuracy(MARGINS) == (4 + 0.5) / 8
    assert evaluate.accuracy(np.zeros(7)) == 0.5


def test_brier_is_the_squared_error_of_the_label():
    probability = [1 / (1 + math.exp(-m)) for m in MARGINS[:5]]
    expected = [(1 - p) ** 2 for p in probability] + [0.0, 1.0]
    expected.append(expected[1])
    np.testing.assert_allclose(evaluate.brier_score(MARGINS), np.mean(expected))
    assert evaluate.brier_score(np.zeros(3)) == 0.25


def test_expected_calibration_error_by_hand():
    """Two bins: confidences .6 (1 of 2 right) and .9 (2 of 2 right)."""
    at = lambda p: math.log(p / (1 - p))
    margins = np.array([at(0.6), -at(0.6), at(0.9), at(0.9)])
    expected = 0.5 * abs(0.5 - 0.6) + 0.5 * abs(1.0 - 0.9)
    np.testing.assert_allclose(
        evaluate.expected_calibration_error(margins, bins=5), expected
    )
    records = evaluate.reliability_bins(margins, bins=5)
    assert [r["pairs"] for r in records] == [2, 2]
    np.testing.assert_allclose([r["confidence"] for r in records], [0.6, 0.9])
    np.testing.assert_allclose([r["accuracy"] for r in records], [0.5, 1.0])


def test_the_calibration_error_of_calibrated_margins():
    rng = np.random.default_rng(0)
    margins = rng.normal(size=200_000) * 2
    right = rng.random(margins.shape) < 1 / (1 + np.exp(-margins))
    labeled = np.where(right, margins, -margins)
    assert evaluate.expected_calibration_error(labeled) < 0.005
    assert evaluate.expected_calibration_error(3 * labeled) > 0.05


def test_extreme_margins_fill_the_last_bin():
    (record,) = evaluate.reliability_bins(np.array([1e4, 1e4, -1e4]))
    assert record == {
        "lower": 0.95,
        "upper": 1.0,
        "pairs": 3,
        "confidence": 1.0,
        "accuracy": 2 / 3,
    }


@pytest.mark.parametrize("hits", [0, 3, 10, 20])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_interval_equals_scipys(hits, confidence):
    ours = evaluate.wilson_interval(hits / 20, 20, confidence=confidence)
    theirs = binomtest(hits, 20).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_bootstrap_interval_is_normal_for_many_samples():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=4000)
    low, high = evaluate.bootstrap_interval(values, confidence=0.9)
    half = norm.ppf(0.95) * values.std() / math.sqrt(len(values))
    expected = [values.mean() - half, values.mean() + half]
    np.testing.assert_allclose([low, high], expected, atol=0.1 * half)
    assert (low, high) == evaluate.bootstrap_interval(values, confidence=0.9)
    assert evaluate.bootstrap_interval(np.full(5, 2.0)) == (2.0, 2.0)


def test_preference_metrics_is_one_flat_record():
    margins = np.array([1.0, 0.0, -1.0])
    record = evaluate.preference_metrics(margins)
    assert record["pairs"] == 3
    assert record["rewards/accuracies"] == 0.5
    low, high = record["rewards/accuracies_low"], record["rewards/accuracies_high"]
    assert (low, high) == evaluate.wilson_interval(0.5, 3)
    assert record["rewards/margins"] == 0.0
    assert record["rewards/margins_low"] <= 0 <= record["rewards/margins_high"]
    assert record["calibration/brier"] == evaluate.brier_score(margins)
    assert all(type(value) in (int, float) for value in record.values())
    single = evaluate.preference_metrics(margins.astype(np.float32))
    assert single == record


@pytest.mark.parametrize("margins", [[], [1.0, float("nan")], [[1.0]]])
def test_invalid_margins_are_rejected(margins):
    for metric in (
        evaluate.accuracy,
        evaluate.brier_score,
        evaluate.expected_calibration_error,
        evaluate.bootstrap_interval,
    ):
        with pytest.raises(ValueError, match="at least one and none of them NaN"):
            metric(np.array(margins))


def test_arguments_out_of_range_are_rejected():
    with pytest.raises(ValueError, match=r"confidence in \(0, 1\), got 95"):
        evaluate.wilson_interval(0.5, 10, confidence=95)
    with pytest.raises(ValueError, match="got 0.5 of 0"):
        evaluate.wilson_interval(0.5, 0)
    with pytest.raises(ValueError, match="bins >= 1, got 0"):
        evaluate.reliability_bins(np.ones(3), bins=0)
