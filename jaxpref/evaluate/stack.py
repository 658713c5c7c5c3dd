"""Stacked judges: margins of several feature groups, weighted by cross-validation.

Each judge is a cross-fitted Bradley-Terry model on one group of features.  Its margins
for the training pairs come from inner folds, and are scaled to a mean square of 1.  The
stack adds the judges' margins with weights of at least 0 near a common one:

    min over w >= 0   mean of  softplus(-sum over g of w_g m_g)  +  K / 2 |w - c|^2

c is the best common weight of all judges.  A stack of few or noisy labels is more
accurate with equal weights than with the most likely ones.  So K is the largest of a
few values whose loss, in a cross-validation on the training pairs, is not clearly above
the least one.  An uninformative judge then gets no weight if there are enough labels to
tell.

The weights of different folds give margins of different sizes, by chance.  So the
stacked margins of each fold are scaled to the same mean square on its training pairs,
such that ranks do not depend on the fold.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.evaluate.crossfit import cross_fit, sigmoid

RIDGES = (1.0, 0.1, 1e-3)
"""Candidates for K, in descending order."""
SWEEPS = 100
SMALLEST = 1e-3
"""Smallest root mean square of the stacked margins, which keeps their ranks."""


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
      another label on its prompt, apart from the size that all margins share.

    References:
      Wolpert, "Stacked Generalization", 1992; Breiman, "Stacked Regressions", 1996, for
      weights of at least 0.
    """
    fits = {
        name: cross_fit(columns, folds, inner_folds, learned=learned)
        for name, columns in groups.items()
    }
    alone = np.stack([fit.margins for fit in fits.values()], axis=1)
    margins, weights, sizes = np.zeros(len(folds)), [], []
    for number, fold in enumerate(np.unique(folds)):
        train = folds != fold
        if learned is not None:
            train &= learned
        if not train.any():
            continue
        inner = np.stack([fit.inner[number] for fit in fits.values()], axis=1)[train]
        scales = np.sqrt(np.mean(inner**2, axis=0))
        scales[scales == 0] = np.inf  # all margins of this judge are 0
        unit = inner / scales
        found = chosen(unit, inner_folds[train])
        size = _size(unit @ found)
        if size == 0:  # no judge knows anything, but some order is needed
            found = np.ones(len(found))
        found /= _size(unit @ found) or 1.0
        sizes.append(size)
        weights.append(found)
        margins[folds == fold] = alone[folds == fold] @ (found / scales)
    size = max(float(np.mean(sizes)), SMALLEST) if sizes else 0.0
    mean = size * np.mean(weights, axis=0) if weights else np.zeros(len(fits))
    return Stack(
        size * margins,
        {name: fit.margins for name, fit in fits.items()},
        dict(zip(fits, map(float, mean))),
    )


def chosen(
    margins: Float[np.ndarray, "pairs judges"], folds: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " judges"]:
    """`non_negative` with the largest of `RIDGES` that is not clearly worse.

    A ridge is clearly worse than the best one if the sum of the differences of their
    losses, each from a fit to the other folds, exceeds half of its standard error.
    """
    losses = np.zeros((len(RIDGES), len(margins)))
    for fold in np.unique(folds):
        test = folds == fold
        if test.all():
            continue  # a single fold: no training pairs
        for number, ridge in enumerate(RIDGES):
            found = non_negative(margins[~test], ridge=ridge)
            losses[number, test] = np.logaddexp(0, -margins[test] @ found)
    surplus = losses - losses[np.argmin(losses.sum(axis=1))]
    error = np.sqrt(len(margins)) * surplus.std(axis=1)
    first = int(np.argmax(surplus.sum(axis=1) <= error / 2))
    return non_negative(margins, ridge=RIDGES[first])


def non_negative(
    margins: Float[np.ndarray, "pairs judges"], *, ridge: float
) -> Float[np.ndarray, " judges"]:
    """Weights of at least 0 near a common weight, by coordinate descent.

    Minimizes the loss at the top of this file, with K = `ridge`.  A coordinate's step
    uses the bound m'm / 4 of its second derivative, so that every step decreases the
    loss.  The common weight is the best one, under a ridge of `SMALLEST`.
    """
    count, judges = margins.shape
    together = margins.sum(axis=1)
    common = _descended(together[:, None], np.zeros(1), np.zeros(1), ridge=SMALLEST)
    start = np.full(judges, common[0])
    return _descended(margins, start, start, ridge=ridge)


def _descended(
    margins: np.ndarray, start: np.ndarray, center: np.ndarray, *, ridge: float
) -> np.ndarray:
    """Weights of at least 0 near the center."""
    bounds = np.mean(margins**2, axis=0) / 4 + ridge
    weights, total = start.copy(), margins @ start
    for _ in range(SWEEPS):
        moved = 0.0
        for j in range(len(weights)):
            gradient = -np.mean(margins[:, j] * sigmoid(-total))
            gradient += ridge * (weights[j] - center[j])
            step = max(-weights[j], -gradient / bounds[j])
            weights[j] += step
            total += step * margins[:, j]
            moved = max(moved, abs(step))
        if moved < 1e-5:
            break
    return weights


def _size(margins: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(margins**2))) if len(margins) else 0.0
