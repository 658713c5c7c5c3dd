"""The table behind tests/test_losses.py: one row proves one loss.

To add a loss, add a row.  Its oracle is written from the paper, in float64 numpy, and
shares nothing with the implementation: where the paper has two terms, the oracle has
two terms, whatever form the code found more accurate.
"""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
from scipy.special import expit, log_expit, logsumexp

from jaxpref import losses

LOG2 = float(np.log(2.0))


@dataclasses.dataclass(frozen=True)
class Row:
    """What is expected of one loss.

    All functions take float64 numpy arrays and the options as keywords.
    """

    loss: Callable
    score: Callable
    """`score(*arrays, **options)`: the one number of a pair that the loss is about."""
    value: Callable
    """`value(score, **options)`: the loss, as the paper writes it."""
    slope: Callable
    """`slope(score, **options)`: the derivative of the loss in the score."""
    options: tuple[dict, ...]
    """The grid; the last one is used where one setting is enough."""
    extremes: Callable | None = None
    """`extremes(**options)`: slopes as score -> -inf and +inf; None if unbounded."""
    at_reference: Callable | None = None
    """`at_reference(**options)`: the loss where policy and reference agree."""
    base: Callable | None = None
    """The loss that this one is, bit for bit, at flip rate 0."""
    mirror: Callable | None = None
    """`mirror(loss, swapped, score, **options)`: 0 where swapping the answers does what
    it must; None for losses that read one answer."""

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def reads(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.loss).parameters.values()
        return tuple(p.name for p in parameters if p.kind != p.KEYWORD_ONLY)


def log_ratio_margin(policy_chosen, policy_rejected, chosen, rejected, **_):
    return (policy_chosen - policy_rejected) - (chosen - rejected)


def reward_margin(*arrays, beta, **_):
    return beta * log_ratio_margin(*arrays)


def averaged_margin(pc, pr, rc, rr, chosen_lengths, rejected_lengths, **_):
    return (pc - rc) / chosen_lengths - (pr - rr) / rejected_lengths


def simpo_margin(pc, pr, chosen_lengths, rejected_lengths, *, beta, **_):
    return beta / chosen_lengths * pc - beta / rejected_lengths * pr


def flip_options(*rates):
    return tuple({"beta": b, "flip_rate": e} for b in (0.1, 1.0) for e in rates)


def log_odds(loss):
    """logit of exp(-loss): undoes a logistic loss."""
    return -np.log(np.expm1(loss))


def forward_slope(h, flip_rate, **_):
    """-(1 - 2e) s(h) s(-h) / p, divided through by the larger of s(h) and s(-h)."""
    e = flip_rate
    right = expit(-h) / ((1 - e) + e * np.exp(-np.maximum(h, 0)))
    wrong = expit(h) / ((1 - e) * np.exp(np.minimum(h, 0)) + e) if e else expit(-h)
    return -(1 - 2 * e) * np.where((h >= 0) | (e == 0), right, wrong)


TABLE = (
    Row(
        loss=losses.dpo,
        score=reward_margin,
        value=lambda h, **_: -log_expit(h),
        slope=lambda h, **_: -expit(-h),
        options=({}, {"beta": 1.0}),
        extremes=lambda **_: (-1.0, 0.0),
        at_reference=lambda **_: LOG2,
        # -log s(h) + log s(-h) = -h
        mirror=lambda loss, swapped, h, **_: loss - swapped + h,
    ),
    Row(
        loss=losses.cdpo,
        score=reward_margin,
        value=lambda h, flip_rate, **_: (
            -(1 - flip_rate) * log_expit(h) - flip_rate * log_expit(-h)
        ),
        slope=lambda h, flip_rate, **_: -(expit(-h) - flip_rate),
        options=flip_options(0.0, 0.1, 0.4),
        extremes=lambda flip_rate, **_: (-(1 - flip_rate), flip_rate),
        at_reference=lambda **_: LOG2,
        base=losses.dpo,
        mirror=lambda loss, swapped, h, flip_rate, **_: (
            loss - swapped + (1 - 2 * flip_rate) * h
        ),
    ),
    Row(
        loss=losses.rdpo,
        score=reward_margin,
        value=lambda h, flip_rate, **_: (
            (-(1 - flip_rate) * log_expit(h) + flip_rate * log_expit(-h))
            / (1 - 2 * flip_rate)
        ),
        slope=lambda h, flip_rate, **_: -(expit(-h) + flip_rate / (1 - 2 * flip_rate)),
        options=flip_options(0.0, 0.1, 0.4),
        extremes=lambda flip_rate, **_: (
            -(1 - flip_rate) / (1 - 2 * flip_rate),
            -flip_rate / (1 - 2 * flip_rate),
        ),
        at_reference=lambda **_: LOG2,
        base=losses.dpo,
        mirror=lambda loss, swapped, h, flip_rate, **_: (
            loss - swapped + h / (1 - 2 * flip_rate)
        ),
    ),
    Row(
        loss=losses.forward_dpo,
        score=reward_margin,
        value=lambda h, flip_rate, **_: (
            -logsumexp(
                np.stack([log_expit(h), log_expit(-h)]),
                axis=0,
                b=np.array([1 - flip_rate, flip_rate]).reshape(2, *[1] * np.ndim(h)),
            )
        ),
        slope=forward_slope,
        options=flip_options(0.0, 0.1, 0.4),
        extremes=lambda flip_rate, **_: (0.0 if flip_rate else -1.0, 0.0),
        at_reference=lambda **_: LOG2,
        base=losses.dpo,
        # The two labels' probabilities sum to 1.
        mirror=lambda loss, swapped, h, **_: np.exp(-loss) + np.exp(-swapped) - 1,
    ),
    Row(
        loss=losses.ipo,
        score=log_ratio_margin,
        value=lambda d, beta=0.1: (d - 1 / (2 * beta)) ** 2,
        slope=lambda d, beta=0.1: 2 * (d - 1 / (2 * beta)),
        options=({}, {"beta": 0.5}),
        at_reference=lambda beta=0.1: 1 / (2 * beta) ** 2,
        mirror=lambda loss, swapped, d, beta=0.1: loss - swapped + 2 * d / beta,
    ),
    Row(
        loss=losses.ipo_averaged,
        score=averaged_margin,
        value=lambda d, beta=0.1: (d - 1 / (2 * beta)) ** 2,
        slope=lambda d, beta=0.1: 2 * (d - 1 / (2 * beta)),
        options=({}, {"beta": 0.5}),
        at_reference=lambda beta=0.1: 1 / (2 * beta) ** 2,
        mirror=lambda loss, swapped, d, beta=0.1: loss - swapped + 2 * d / beta,
    ),
    Row(
        loss=losses.simpo,
        score=simpo_margin,
        value=lambda m, gamma=0.5, **_: -log_expit(m - gamma),
        slope=lambda m, gamma=0.5, **_: -expit(-(m - gamma)),
        options=({}, {"beta": 10.0, "gamma": 3.0}, {"beta": 2.5, "gamma": 0.25}),
        extremes=lambda **_: (-1.0, 0.0),
        # The margins of the two orders, after the target is taken off, sum to -2 gamma.
        mirror=lambda loss, swapped, m, gamma=0.5, **_: (
            log_odds(loss) + log_odds(swapped) + 2 * gamma
        ),
    ),
    Row(
        loss=losses.sft,
        score=lambda policy_chosen, **_: policy_chosen,
        value=lambda logp, **_: -logp,
        slope=lambda logp, **_: -np.ones_like(logp),
        options=({},),
        extremes=lambda **_: (-1.0, -1.0),
    ),
)
