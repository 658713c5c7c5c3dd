"""Losses: what number should be small?

Pure functions on jax arrays: one equation each, one loss per pair out, the caller
reduces.  Log-probs come first and in the field's order, hyper-parameters are
keyword-only, and everything is computed in at least float32.  A loss declares the
arrays it reads by the names of its positional parameters.

Throughout, for a prompt x with chosen answer y_w and rejected answer y_l:

    D     log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x), the margin in nats
    h     beta D, the implicit reward margin
    s(z)  1 / (1 + exp(-z)), the logistic function
    e     the flip rate: the probability that a label is wrong
"""

from jaxpref.losses._preference import dpo as dpo
from jaxpref.losses._preference import ipo as ipo
from jaxpref.losses._preference import ipo_averaged as ipo_averaged
from jaxpref.losses._preference import sft as sft
from jaxpref.losses._preference import simpo as simpo
from jaxpref.losses._rewards import implicit_rewards as implicit_rewards
from jaxpref.losses._rewards import reward_accuracies as reward_accuracies
from jaxpref.losses._rewards import reward_margins as reward_margins
from jaxpref.losses._robust import cdpo as cdpo
from jaxpref.losses._robust import forward_dpo as forward_dpo
from jaxpref.losses._robust import rdpo as rdpo
from jaxpref.losses._sequence import sum_by_completion as sum_by_completion

__all__ = [
    "cdpo",
    "dpo",
    "forward_dpo",
    "implicit_rewards",
    "ipo",
    "ipo_averaged",
    "rdpo",
    "reward_accuracies",
    "reward_margins",
    "sft",
    "simpo",
    "sum_by_completion",
]
