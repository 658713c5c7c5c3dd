"""Comparing models by their answers to the same prompts."""

from jaxpref.evaluate.compare.length_control import (
    length_controlled_win_rate as length_controlled_win_rate,
)
from jaxpref.evaluate.compare.style_control import bradley_terry as bradley_terry
from jaxpref.evaluate.compare.style_control import style_features as style_features
from jaxpref.evaluate.compare.win_rate import win_rate as win_rate
