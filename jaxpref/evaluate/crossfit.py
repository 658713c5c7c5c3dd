"""Cross-fitted margins: from models trained on neither the pair nor its prompt.

All computations are in float64 on the host.  The model is a linear reward r(y) =
b . f(y) of the features of a completion, fitted as Bradley-Terry with a Gaussian prior:

    min over b   mean of  softplus(-b . x)  +  penalty / 2 |b|^2,    x = f(w) - f(l)

w is the answer that the label prefers.  There is no intercept, so exchanging the
answers only changes the sign of the margin b . x.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.data.hashing import hash_uniforms

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-3, 6))
"""Candidate penalties; the columns are scaled to a mean square of 1."""
STEPS = 200
TOLERANCE = 1e-6
"""Tolerance of the margins, in nats."""
ENOUGH = 1e-4
"""The same for cross-fitted margins, of which three digits are enough."""


@dataclasses.dataclass(frozen=True)
class CrossFit:
    """Margins of N pairs, each from a model trained on the other folds."""

    margins: np.ndarray
    """float64 [N]; positive where the model agrees with the label; not calibrated."""
    penalties: np.ndarray
    """float64 [folds]; selected by cross-validation on each fold's training pairs."""
    inner: np.ndarray
    """float64 [folds, N]; per fold, the margins of its training pairs in that inner
    cross-validation; 0 for the other pairs."""


def prompt_folds(
    prompts: Iterable[str], *, folds: int, seed: int
) -> Int[np.ndarray, " pairs"]:
    """Assigns each pair to a fold by the hash of its prompt.

    Equal prompts share a fold, the numbers of prompts in the folds differ by at most 1,
    and the order of the rows does not matter.

    Args:
      prompts: one key per pair.
      folds: number of folds.
      seed: different seeds give independent assignments.
    """
    different, index = np.unique(list(prompts), return_inverse=True)
    uniforms = hash_uniforms(map(str, different), salt=f"fold {seed}")
    dealt = np.empty(len(different), np.int64)
    dealt[np.argsort(uniforms)] = np.arange(len(different)) % folds
    return dealt[index]


def fit_path(
    differences: Float[np.ndarray, "pairs features"],
    penalties: Sequence[float],
    targets: Float[np.ndarray, " pairs"] | None = None,
) -> Float[np.ndarray, "features penalties"]:
    """Fits the coefficients for several penalties at once.

    Uses Newton's method with the upper bound X'X / 4 in place of the Hessian.  Every
    step decreases the loss, and a single eigendecomposition serves all steps and
    penalties.

    Args:
      differences: x, features of the preferred answer minus those of the other.
      penalties: positive numbers.
      targets: probabilities that the labels are right; None means 1.

    Returns:
      The coefficients b, one column per penalty.

    References:
      Böhning and Lindsay, "Monotonicity of Quadratic-Approximation Algorithms", 1988.
    """
    basis, bounds = _principal(differences)
    rotated = differences @ basis
    return basis @ _descend(rotated, bounds, penalties, targets, TOLERANCE)


def cross_fit(
    differences: Float[np.ndarray, "pairs features"],
    folds: Int[np.ndarray, " pairs"],
    inner_folds: Int[np.ndarray, " pairs"],
    *,
    penalties: Sequence[float] = PENALTIES,
    targets: Float[np.ndarray, " pairs"] | None = None,
    learned: Bool[np.ndarray, " pairs"] | None = None,
) -> CrossFit:
    """The margin of every pair under a model fitted to the pairs of the other folds.

    The columns must be scaled over all pairs; this uses no labels, because a label is
    only the sign of its row.  The penalty of each fold minimizes the logistic loss in a
    cross-validation by `inner_folds` on its training pairs alone.

    Args:
      differences: x, features of the preferred answer minus those of the other.
      folds: fold of each pair; a prompt's pairs share one.
      inner_folds: folds for selecting the penalty, also by prompt.
      penalties: candidate penalties.
      targets: probabilities that the labels are right, for a second round; None means
        1.
      learned: which pairs the models may be fitted to; None means all.

    Returns:
      `CrossFit`; the margins are 0 if no training pairs are left.
    """
    # The principal directions of all pairs do not depend on the labels.  Their bound is
    # also one for each part of the pairs, so that one decomposition serves all fits.
    basis, bounds = _principal(differences)
    rotated = differences @ basis
    targets = np.ones(len(folds)) if targets is None else targets
    learned = np.ones(len(folds), bool) if learned is None else learned
    margins, chosen, inner = np.zeros(len(folds)), [], []

    def fitted(train, candidates, start=None):
        scale = len(folds) / train.sum()
        part = rotated[train], scale * bounds, candidates, targets[train]
        return _descend(*part, ENOUGH, start)

    for fold in np.unique(folds):
        train, inside = learned & (folds != fold), np.zeros(len(folds))
        chosen.append(np.nan)
        inner.append(inside)
        if not train.any():
            continue
        every = fitted(train, penalties)
        left_out = np.zeros((len(folds), len(penalties)))
        for held in np.unique(inner_folds[train]):
            test = train & (inner_folds == held)
            if not (train & ~test).any():
                continue  # a single fold: no training pairs
            left_out[test] = rotated[test] @ fitted(train & ~test, penalties, every)
        best = _least_loss(left_out[train], targets[train])
        inside[train] = left_out[train, best]
        margins[folds == fold] = rotated[folds == fold] @ every[:, best]
        chosen[-1] = float(penalties[best])
    return CrossFit(margins, np.array(chosen), np.array(inner))


def _principal(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvectors of X'X / (4 N), [features, R], and the eigenvalues, [R]."""
    count, width = differences.shape
    # The smaller of the two Gram matrices; both have the same positive eigenvalues.
    if width <= count:
        bounds, basis = np.linalg.eigh(differences.T @ differences / (4 * count))
        return basis, np.maximum(bounds, 0.0)
    bounds, rotation = np.linalg.eigh(differences @ differences.T / (4 * count))
    positive = bounds > 1e-12 * bounds[-1]
    bounds = bounds[positive]
    return differences.T @ rotation[:, positive] / np.sqrt(4 * count * bounds), bounds


def _descend(
    rotated: np.ndarray,
    bounds: np.ndarray,
    penalties: Sequence[float],
    targets: np.ndarray | None,
    tolerance: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Coefficients in the basis, [R, penalties]; bounds are at least the Hessian."""
    count, bounds = len(rotated), bounds[:, None]
    wanted = 1.0 if targets is None else targets[:, None]
    penalty = np.asarray(penalties, np.float64)
    found = np.zeros((len(bounds), len(penalty))) if start is None else start.copy()
    for _ in range(STEPS):
        surplus = sigmoid(rotated @ found) - wanted
        gradient = rotated.T @ surplus / count + penalty * found
        step = gradient / (bounds + penalty)
        found -= step
        # Root mean square change of the margins, in nats.
        if np.sqrt(np.max(np.sum(4 * bounds * step**2, axis=0))) < tolerance:
            break
    return found


def _least_loss(margins: np.ndarray, targets: np.ndarray) -> int:
    """The column of margins with the least logistic loss."""
    # -w log s(m) - (1 - w) log s(-m)
    losses = np.sum(np.logaddexp(0, margins) - targets[:, None] * margins, axis=0)
    # Among equal losses choose the largest penalty, the most conservative choice.
    return len(losses) - 1 - int(np.argmin(losses[::-1]))


def scaled(columns: Float[np.ndarray, "pairs features"]) -> np.ndarray:
    """Divides columns by their root mean square; columns of zeros are unchanged."""
    sizes = np.sqrt(np.mean(columns**2, axis=0))
    return columns / np.where(sizes > 0, sizes, 1.0)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) without overflow."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)
