"""Evaluation: metrics with confidence intervals, and audits of preference data."""

from jaxpref.evaluate.metrics import accuracy as accuracy
from jaxpref.evaluate.metrics import bootstrap_interval as bootstrap_interval
from jaxpref.evaluate.metrics import brier_score as brier_score
from jaxpref.evaluate.metrics import (
    expected_calibration_error as expected_calibration_error,
)
from jaxpref.evaluate.metrics import preference_metrics as preference_metrics
from jaxpref.evaluate.metrics import reliability_bins as reliability_bins
from jaxpref.evaluate.metrics import wilson_interval as wilson_interval

__all__ = [
    "accuracy",
    "bootstrap_interval",
    "brier_score",
    "expected_calibration_error",
    "preference_metrics",
    "reliability_bins",
    "wilson_interval",
]
