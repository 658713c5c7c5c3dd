"""Margins of pairs under models that saw neither them nor their prompts.

Everything in float64 on the host.  The model is a linear reward r(y) = b . f(y) of the
features of a completion, fitted as Bradley-Terry with a Gaussian prior:

    min over b   mean of  softplus(-b . x)  +  penalty / 2 |b|^2,    x = f(w) - f(l)

w is the answer that the label prefers.  There is no intercept: exchanging the answers
changes the sign of the margin b . x and nothing else.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxpref.data.hashing import hash_uniforms

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-3, 6))
"""From which the penalty is chosen; columns are scaled to a mean square of 1."""
STEPS = 200
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class CrossFit:
    """Margins of N pairs, each by the model of the other folds."""

    margins: np.ndarray
    """float64 [N]; positive where the model agrees with the label; not calibrated."""
    penalties: np.ndarray
    """float64 [folds]; chosen by cross-validation within each fold's training pairs."""


def prompt_folds(
    prompts: Iterable[str], *, folds: int, seed: int
) -> Int[np.ndarray, " pairs"]:
    """The fold of each pair: prompts in the order of their hashes are dealt in turn.

    Equal prompts share a fold, folds differ by one prompt at most, and the order of
    rows does not matter.

    Args:
      prompts: one key per pair.
      folds: how many there are.
      seed: another seed gives an unrelated division.
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
    """Coefficients for several penalties at once.

    Newton's method with the curvature's upper bound X'X / 4 in place of the curvature:
    every step lowers the loss, and one eigendecomposition serves all steps and
    penalties.

    Args:
      differences: x, features of the preferred answer minus those of the other.
      penalties: positive numbers.
      targets: probabilities that the labels are right; None means 1.

    Returns:
      b of each penalty as a column.

    References:
      Böhning and Lindsay, "Monotonicity of Quadratic-Approximation Algorithms", 1988.
    """
    count, width = differences.shape
    # The smaller of the two Gram matrices; both have the same positive eigenvalues.
    if width <= count:
        bounds, basis = np.linalg.eigh(differences.T @ differences / (4 * count))
    else:
        bounds, rotation = np.linalg.eigh(differences @ differences.T / (4 * count))
        kept = bounds > 1e-12 * bounds[-1]
        bounds = bounds[kept]
        basis = differences.T @ rotation[:, kept] / np.sqrt(4 * count * bounds)
    bounds = np.maximum(bounds, 0.0)[:, None]
    rotated = differences @ basis
    wanted = 1.0 if targets is None else targets[:, None]
    penalty = np.asarray(penalties, np.float64)
    found = np.zeros((len(bounds), len(penalty)))
    for _ in range(STEPS):
        surplus = sigmoid(rotated @ found) - wanted
        gradient = rotated.T @ surplus / count + penalty * found
        step = gradient / (bounds + penalty)
        found -= step
        # The root mean square change of the margins, in nats.
        if np.sqrt(np.max(np.sum(4 * bounds * step**2, axis=0))) < TOLERANCE:
            break
    return basis @ found


def cross_fit(
    differences: Float[np.ndarray, "pairs features"],
    folds: Int[np.ndarray, " pairs"],
    inner_folds: Int[np.ndarray, " pairs"],
    *,
    penalties: Sequence[float] = PENALTIES,
    targets: Float[np.ndarray, " pairs"] | None = None,
) -> CrossFit:
    """The margin of every pair under the model fitted to the pairs of other folds.

    Columns are scaled to a mean square of 1 over all pairs: that reads no label, since
    a label is only the sign of its row.  The penalty of a fold has the least logistic
    loss in a cross-validation by `inner_folds` of its training pairs alone.

    Args:
      differences: x, features of the preferred answer minus those of the other.
      folds: fold of each pair; a prompt's pairs share one.
      inner_folds: the division for the choice of the penalty; likewise by prompt.
      penalties: from which it is chosen.
      targets: probabilities that the labels are right, for a second round; None means
        1.

    Returns:
      `CrossFit`; margin 0 in a fold that leaves nothing to train on.
    """
    margins, chosen = np.zeros(len(folds)), []
    for fold in np.unique(folds):
        train = folds != fold
        if not train.any():
            chosen.append(np.nan)
            continue
        part = (differences[train], None if targets is None else targets[train])
        penalty = _best_penalty(*part, inner_folds[train], penalties)
        margins[~train] = (
            differences[~train] @ fit_path(part[0], [penalty], part[1])[:, 0]
        )
        chosen.append(penalty)
    return CrossFit(margins, np.array(chosen))


def scaled(columns: Float[np.ndarray, "pairs features"]) -> np.ndarray:
    """Columns divided by their root mean square; constant zeros stay."""
    sizes = np.sqrt(np.mean(columns**2, axis=0))
    return columns / np.where(sizes > 0, sizes, 1.0)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) without overflow."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def _best_penalty(differences, targets, folds, penalties) -> float:
    losses = np.zeros(len(penalties))
    for fold in np.unique(folds):
        test = folds == fold
        if test.all():
            continue  # a single fold: nothing to learn from
        learned = None if targets is None else targets[~test]
        margins = differences[test] @ fit_path(differences[~test], penalties, learned)
        right = 1.0 if targets is None else targets[test, None]
        # -w log s(m) - (1 - w) log s(-m)
        losses += np.sum(np.logaddexp(0, margins) - right * margins, axis=0)
    # The largest of equals: what tells nothing about the choice asks for caution.
    return float(penalties[len(penalties) - 1 - np.argmin(losses[::-1])])
