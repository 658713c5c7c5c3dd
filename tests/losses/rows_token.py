"""Rows of jaxpref/losses/_token.py."""

from jaxpref import losses
from tests.losses.row import MARGIN_SHIFTS, Row, log_ratio_margin, logistic

SHIFTS = MARGIN_SHIFTS + (("chosen_kls", "rejected_kls"),)
MASKED = (
    ("chosen_masked_log_ratios", "rejected_masked_log_ratios"),
    ("chosen_masked_kls", "rejected_masked_kls"),
)


def tdpo2_margin(*arrays, alpha, fixed=None):
    chosen_kls = arrays[4] if fixed is None else fixed[4]
    return log_ratio_margin(*arrays) - alpha * (arrays[5] - chosen_kls)


def sparse_margin(ratios_w, ratios_l, kls_w, kls_l):
    """u - d in the authors' code, whose divergences are negated."""
    u, d = ratios_w - ratios_l, -kls_w - -kls_l
    return u - d


ROWS = (
    Row(
        loss=losses.sparse_po,
        oracle=lambda *a, beta: logistic(beta * sparse_margin(*a)),
        defaults={"beta": 0.1},
        options=({}, {"beta": 0.8}),
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped + beta * sparse_margin(*a)
        ),
        shifts=MASKED,
    ),
    Row(
        loss=losses.tdpo1,
        oracle=lambda *a, beta: logistic(beta * tdpo2_margin(*a, alpha=1)),
        defaults={"beta": 0.1},
        options=({}, {"beta": 1.0}),
        mirror=lambda loss, swapped, *a, beta: (
            loss - swapped + beta * tdpo2_margin(*a, alpha=1)
        ),
        shifts=SHIFTS,
    ),
    Row(
        loss=losses.tdpo2,
        oracle=lambda *a, alpha, beta, frozen: logistic(
            beta * tdpo2_margin(*a, alpha=alpha, fixed=frozen)
        ),
        defaults={"alpha": 0.5, "beta": 0.1},
        options=({}, {"alpha": 0.0}, {"alpha": 2.0, "beta": 1.0}),
        special=(({"alpha": 0.0, "beta": 0.3}, losses.dpo, {"beta": 0.3}),),
        mirror=lambda loss, swapped, *a, alpha, beta: (
            loss - swapped + beta * tdpo2_margin(*a, alpha=alpha)
        ),
        shifts=SHIFTS,
    ),
)
