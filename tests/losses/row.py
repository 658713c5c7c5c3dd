"""What a row of the tables states of one loss, and the words its oracle is written in.

An oracle is written from the paper, in numpy, and shares nothing with the code: where
the paper has two terms the oracle has two terms, whatever form the code found more
accurate.  It works in the widest float of the machine, and its gradient is taken by
central differences, so nobody derives anything by hand.
"""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
from scipy.special import log_expit

LOG2 = float(np.log(2.0))
EXTREMES = (1e4, -1e4, 1e3, -1e3, 30.0, -30.0)

FOUR = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)
SIDE_SHIFTS = (
    ("policy_chosen_logps", "reference_chosen_logps"),
    ("policy_rejected_logps", "reference_rejected_logps"),
)
"""Sets of arrays whose shift does not change a loss of the two log-ratios."""
MARGIN_SHIFTS = SIDE_SHIFTS + (
    ("policy_chosen_logps", "policy_rejected_logps"),
    ("reference_chosen_logps", "reference_rejected_logps"),
)
"""Sets of arrays whose shift does not change a loss of the log-ratio margin."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """The expectations for one loss.  Functions take numpy arrays and options."""

    loss: Callable
    oracle: Callable
    """`oracle(*arrays, **options)`: the paper's loss, one number a pair.

    Options are complete: `defaults` and the option set of the case.  Where the paper
    holds a part fixed in the gradient, the oracle has a keyword `frozen`: the arrays at
    which that part is computed."""
    defaults: dict = dataclasses.field(default_factory=dict)
    """The paper's hyperparameters, which the signature must match."""
    options: tuple[dict, ...] = ({},)
    """The grid of options; the last is used if one setting is enough."""
    draw: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Ranges of arrays, by name, if the default is outside the domain."""
    extremes: tuple[float, ...] = EXTREMES
    """Values of the first array at which loss and gradients must still be finite."""
    at_reference: Callable | None = None
    """`at_reference(**options)`: the loss if policy and reference agree."""
    base: Callable | None = None
    """The loss that this one equals, bit for bit, at flip rate 0."""
    special: tuple[tuple[dict, Callable, dict], ...] = ()
    """`(options, other, options of other)`: settings where it equals another loss."""
    mirror: Callable | None = None
    """`mirror(loss, swapped, *arrays, **options)`: 0 where swapping the answers does
    what it must; None for losses that read one answer."""
    shifts: tuple[tuple[str, ...], ...] = ()
    """Sets of arrays to which one constant may be added without changing the loss."""

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def reads(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.loss).parameters.values()
        return tuple(p.name for p in parameters if p.kind != p.KEYWORD_ONLY)

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the batch."""
        return "where" in inspect.signature(self.loss).parameters


def log_ratios(policy_chosen, policy_rejected, chosen, rejected, *_):
    return policy_chosen - chosen, policy_rejected - rejected


def log_ratio_margin(policy_chosen, policy_rejected, chosen, rejected, *_):
    return (policy_chosen - policy_rejected) - (chosen - rejected)


def reward_margin(*arrays, beta, **_):
    """h = beta D."""
    return beta * log_ratio_margin(*arrays)


def logistic_mirror(loss, swapped, *arrays, beta, **_):
    """-log s(h) + log s(-h) = -h."""
    return loss - swapped + reward_margin(*arrays, beta=beta)


def logistic(z):
    """-log s(z)."""
    return -log_expit(z)
