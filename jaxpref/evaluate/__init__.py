"""Evaluation: metrics with intervals, reward against KL, and audits of preferences."""

from jaxpref.evaluate.answers import answer_metrics as answer_metrics
from jaxpref.evaluate.bootstrap import prompt_bootstrap as prompt_bootstrap
from jaxpref.evaluate.frontier import best_possible as best_possible
from jaxpref.evaluate.frontier import choose_setting as choose_setting
from jaxpref.evaluate.frontier import reward_at_kl as reward_at_kl
from jaxpref.evaluate.frontier import share_of_best_possible as share_of_best_possible
from jaxpref.evaluate.frontier import t_interval as t_interval
from jaxpref.evaluate.lists import list_metrics as list_metrics
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
    "answer_metrics",
    "best_possible",
    "bootstrap_interval",
    "brier_score",
    "choose_setting",
    "expected_calibration_error",
    "list_metrics",
    "preference_metrics",
    "prompt_bootstrap",
    "reliability_bins",
    "reward_at_kl",
    "share_of_best_possible",
    "t_interval",
    "wilson_interval",
]
