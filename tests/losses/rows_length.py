"""Rows of jaxpref/losses/_length.py."""

from jaxpref import losses
from tests.losses.row import (
    FOUR,
    LOG2,
    MARGIN_SHIFTS,
    SIDE_SHIFTS,
    Row,
    log_ratio_margin,
    logistic,
    reward_margin,
)

PREFIX_SHIFTS = tuple(
    tuple(name.replace("_logps", "_prefix_logps") for name in names)
    for names in MARGIN_SHIFTS
)


def normalized_margin(pc, pr, rc, rr, chosen_lengths, rejected_lengths):
    return (pc - rc) / chosen_lengths - (pr - rr) / rejected_lengths


def price(chosen_lengths, rejected_lengths, alpha):
    return alpha * chosen_lengths - alpha * rejected_lengths


def discounted_margin(*arrays, alpha):
    """The margin of the likelihoods, each discounted before they are compared."""
    whole, prefixes = arrays[: len(FOUR)], arrays[len(FOUR) :]
    tails = [total - prefix for total, prefix in zip(whole, prefixes)]
    pc, pr, rc, rr = (prefix + alpha * tail for prefix, tail in zip(prefixes, tails))
    return log_ratio_margin(pc, pr, rc, rr)


ROWS = (
    Row(
        loss=losses.ln_dpo,
        oracle=lambda *a, beta: logistic(beta * normalized_margin(*a)),
        defaults={"beta": 5.0},
        options=({}, {"beta": 0.1}),
        at_reference=lambda **_: LOG2,
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped + beta * normalized_margin(*a)
        ),
        shifts=SIDE_SHIFTS,
    ),
    Row(
        loss=losses.r_dpo,
        oracle=lambda *a, beta, alpha: logistic(
            reward_margin(*a, beta=beta) + price(*a[4:], alpha)
        ),
        defaults={"beta": 0.1},
        options=({"alpha": 0.0}, {"alpha": 0.05}, {"beta": 1.0, "alpha": 0.5}),
        special=(({"alpha": 0.0}, losses.dpo, {}),),
        mirror=lambda loss, swapped, *a, beta, alpha: (
            loss - swapped + reward_margin(*a, beta=beta) + price(*a[4:], alpha)
        ),
        shifts=MARGIN_SHIFTS,
    ),
    Row(
        loss=losses.ld_dpo,
        oracle=lambda *a, beta, alpha: logistic(
            beta * discounted_margin(*a, alpha=alpha)
        ),
        defaults={"beta": 0.1, "alpha": 0.5},
        options=({}, {"alpha": 0.0}, {"beta": 1.0, "alpha": 0.25}),
        at_reference=lambda **_: LOG2,
        special=(
            ({"alpha": 1.0}, losses.dpo, {}),
            ({"beta": 0.7, "alpha": 1.0}, losses.dpo, {"beta": 0.7}),
        ),
        mirror=lambda loss, swapped, *a, beta, alpha: (
            loss - swapped + beta * discounted_margin(*a, alpha=alpha)
        ),
        shifts=MARGIN_SHIFTS + PREFIX_SHIFTS,
    ),
)
