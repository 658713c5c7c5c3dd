"""Rows of jaxpref/losses/_batch.py.

Swapping the answers of all pairs at once obeys a law only for the losses that match by
rank, and only in the sum: the ranks turn round.
"""

import numpy as np
from scipy.special import logsumexp

from jaxpref import losses
from tests.losses.row import LOG2, MARGIN_SHIFTS, Row, logistic, reward_margin


def dpo(*arrays, beta):
    return logistic(reward_margin(*arrays, beta=beta))


def dr_dpo(*arrays, beta, beta_prime, frozen):
    """-b' log mean exp(-l / b'): the reweighted batch plus the KL term."""
    held = -dpo(*frozen, beta=beta) / beta_prime
    log_weights = held - logsumexp(held) + np.log(held.size)
    price = beta_prime * (np.exp(log_weights) * log_weights).mean()
    return np.exp(log_weights) * dpo(*arrays, beta=beta) + price


def kl_dpo(*arrays, beta, tau, max_weight, frozen):
    held = dpo(*frozen, beta=beta)
    weights = np.minimum(np.exp((held - held.mean()) / tau), max_weight)
    return weights * dpo(*arrays, beta=beta)


def by_rank(values, others, beta):
    """The k-th smallest value against the k-th smallest other, at the value's index."""
    loss = np.empty_like(values)
    order = np.argsort(values, kind="stable")
    loss[order] = logistic(beta * (values[order] - np.sort(others)))
    return loss


def rank_mirror(loss, swapped, chosen, rejected, *reference, beta):
    margin = reward_margin(chosen, rejected, *reference, beta=beta)
    return loss.sum() - swapped.sum() + margin.sum()


ROWS = (
    Row(
        loss=losses.aot,
        oracle=lambda pc, pr, rc, rr, beta: by_rank(pc - pr, rc - rr, beta),
        defaults={"beta": 0.01},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: LOG2,
        mirror=rank_mirror,
    ),
    Row(
        loss=losses.aot_unpaired,
        oracle=lambda pc, pr, rc, rr, beta: by_rank(pc - rc, pr - rr, beta),
        defaults={"beta": 0.01},
        options=({}, {"beta": 1.0}),
        at_reference=lambda **_: LOG2,
        mirror=rank_mirror,
    ),
    Row(
        loss=losses.dr_dpo,
        oracle=dr_dpo,
        defaults={"beta": 0.1, "beta_prime": 1.0},
        options=({}, {"beta_prime": 50.0}, {"beta": 1.0, "beta_prime": 0.5}),
        at_reference=lambda **_: LOG2,
        special=(({"beta_prime": 1e16}, losses.dpo, {}),),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.kl_dpo,
        oracle=kl_dpo,
        defaults={"beta": 0.1, "tau": 1.0, "max_weight": 10.0},
        options=(
            {},
            {"tau": 100.0},
            {"max_weight": 0.5},
            {"beta": 1.0, "tau": 2.0, "max_weight": 3.0},
        ),
        at_reference=lambda max_weight, **_: min(max_weight, 1) * LOG2,
        special=(({"tau": 1e16}, losses.dpo, {}),),
        shifts=MARGIN_SHIFTS,
    ),
)
