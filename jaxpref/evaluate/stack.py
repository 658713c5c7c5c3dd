"""Stacked judges: margins of several feature groups, weighted by cross-validation.

Each judge is a cross-fitted Bradley-Terry model on one group of features.  Its margins
for the training pairs come from inner folds.  The stack adds the judges' margins with
weights of at least 0 that explain the training labels best:

    min over w >= 0   mean of  softplus(-sum over g of w_g m_g)  +  RIDGE / 2 |w|^2

where the margins are scaled to a mean square of 1.  So an uninformative
judge gets no weight, and the stacked margins are calibrated on pairs that the judges
were not fitted to.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.evaluate.crossfit import cross_fit, sigmoid

RIDGE = 1e-3
SWEEPS = 300


@dataclasses.dataclass(frozen=True)
class Stack:
    """Margins of N pairs from the judges and their stack."""

    margins: Float[np.ndarray, " pairs"]
    """float64 [N]; of the stack, positive where it agrees with the label."""
    alone: Mapping[str, Float[np.ndarray, " pairs"]]
    """float64 [N] by judge; its own cross-fitted margins."""
    weights: Mapping[str, float]
    """The mean weight of each judge over the folds, for margins with a mean square of
    1: how much it moves the stack."""


def stack(
    groups: Mapping[str, Float[np.ndarray, "pairs features"]],
    folds: Int[np.ndarray, " pairs"],
    inner_folds: Int[np.ndarray, " pairs"],
    *,
    learned: Bool[np.ndarray, " pairs"] | None = None,
) -> Stack:
    """Cross-fits a judge per group of features, and stacks them.

    Args:
      groups: differences of features, preferred answer minus the other, by judge.
      folds: fold of each pair; a prompt's pairs share one.
      inner_folds: folds within the training pairs, also by prompt.
      learned: which pairs the judges may be fitted to; None means all.

    Returns:
      `Stack`; neither a pair's judges nor their weights have seen its label, or
      another label on its prompt.

    References:
      Wolpert, "Stacked Generalization", 1992; Breiman, "Stacked Regressions", 1996, for
      weights of at least 0.
    """
    fits = {
        name: cross_fit(columns, folds, inner_folds, learned=learned)
        for name, columns in groups.items()
    }
    alone = np.stack([fit.margins for fit in fits.values()], axis=1)
    margins, weights = np.zeros(len(folds)), []
    for number, fold in enumerate(np.unique(folds)):
        train = folds != fold
        if learned is not None:
            train &= learned
        if not train.any():
            continue
        inner = np.stack([fit.inner[number] for fit in fits.values()], axis=1)[train]
        sizes = np.sqrt(np.mean(inner**2, axis=0))
        sizes[sizes == 0] = np.inf  # all margins of this judge are 0
        found = non_negative(inner / sizes)
        weights.append(found)
        margins[folds == fold] = alone[folds == fold] @ (found / sizes)
    mean = np.mean(weights, axis=0) if weights else np.zeros(len(fits))
    return Stack(
        margins,
        {name: fit.margins for name, fit in fits.items()},
        dict(zip(fits, map(float, mean))),
    )


def non_negative(
    margins: Float[np.ndarray, "pairs judges"],
) -> Float[np.ndarray, " judges"]:
    """Weights of at least 0 that explain the labels best, by coordinate descent.

    Minimizes the loss at the top of this file.  A coordinate's step uses the bound
    m'm / 4 of its second derivative, so that every step decreases the loss.
    """
    count, judges = margins.shape
    bounds = np.mean(margins**2, axis=0) / 4 + RIDGE
    weights, total = np.zeros(judges), np.zeros(count)
    for _ in range(SWEEPS):
        moved = 0.0
        for j in range(judges):
            gradient = -np.mean(margins[:, j] * sigmoid(-total)) + RIDGE * weights[j]
            step = max(-weights[j], -gradient / bounds[j])
            weights[j] += step
            total += step * margins[:, j]
            moved = max(moved, abs(step))
        if moved < 1e-5:
            break
    return weights
