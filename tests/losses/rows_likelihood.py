"""Rows of jaxpref/losses/_likelihood.py."""

from jaxpref import losses
from tests.losses.row import Row

ROWS = (Row(loss=losses.sft, oracle=lambda chosen: -chosen),)
