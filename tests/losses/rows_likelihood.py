"""Rows of jaxpref/losses/_likelihood.py."""

import numpy as np

from jaxpref import losses
from tests.losses.row import Row, logistic, reward_margin

# The chosen answer's likelihood has its own term: only these may shift together.
REJECTED_SHIFTS = (
    ("policy_rejected_logps", "reference_rejected_logps"),
    ("reference_chosen_logps", "reference_rejected_logps"),
)


def sft_pearson(policy, reference, *, beta):
    """f*(t) = t + t^2 / 4 at t = -r."""
    t = -beta * (policy - reference)
    return t + t**2 / 4


def sft_hellinger(policy, reference, *, beta):
    """f*(t) = t / (1 - t) at t = -r; its tangent at 1/2 above that."""
    t = -beta * (policy - reference)
    with np.errstate(divide="ignore"):
        return np.where(t < 0.5, t / (1 - t), 1 + 4 * (t - 0.5))


def rpo(policy_chosen, *arrays, beta, eta):
    preference = logistic(reward_margin(policy_chosen, *arrays, beta=beta))
    return preference + eta * beta * -policy_chosen


def rpo_mirror(loss, swapped, *arrays, beta, eta):
    likelihoods = eta * beta * (arrays[0] - arrays[1])
    return loss - swapped + reward_margin(*arrays, beta=beta) + likelihoods


def iterative_rpo(policy_chosen, *arrays, beta, alpha):
    preference = logistic(reward_margin(policy_chosen, *arrays, beta=beta))
    return preference - alpha * policy_chosen / arrays[-1]


ROWS = (
    Row(loss=losses.sft, oracle=lambda chosen: -chosen),
    *(
        Row(
            loss=loss,
            oracle=oracle,
            defaults={"beta": 0.1},
            options=({}, {"beta": 1.0}),
            at_reference=lambda **_: 0.0,
            shifts=(("policy_chosen_logps", "reference_chosen_logps"),),
        )
        for loss, oracle in (
            (losses.sft_pearson, sft_pearson),
            (losses.sft_hellinger, sft_hellinger),
        )
    ),
    Row(
        loss=losses.rpo,
        oracle=rpo,
        defaults={"beta": 0.01, "eta": 0.005},
        options=({}, {"eta": 0.0}, {"beta": 1.0, "eta": 0.25}),
        special=(
            ({"beta": 0.1, "eta": 0.0}, losses.dpo, {}),
            ({"eta": 0.0}, losses.dpo, {"beta": 0.01}),
        ),
        mirror=rpo_mirror,
        shifts=REJECTED_SHIFTS,
    ),
    Row(
        loss=losses.iterative_rpo,
        oracle=iterative_rpo,
        defaults={"beta": 0.1, "alpha": 1.0},
        options=({}, {"alpha": 0.0}, {"beta": 1.0, "alpha": 0.25}),
        special=(({"alpha": 0.0}, losses.dpo, {}),),
        shifts=REJECTED_SHIFTS,
    ),
)
