"""Density ratios of two classes of prompts, from a cross-fitted classifier.

With f(x) the probability of class 1 by a classifier for which both classes are equally
frequent, f / (1 - f) is p(x | class 1) / p(x | class 0).  A classifier with as many
features as prompts separates the prompts that it has been fitted to, whatever the
classes.  So each prompt's f comes from a fit to other prompts.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

FOLDS = 5
PENALTIES = (10.0, 1.0, 0.1, 0.01)
"""Candidates, for features with a standard deviation of 1."""


@dataclasses.dataclass(frozen=True)
class DensityRatio:
    """A classifier of prompts by logistic regression, one fit per fold."""

    log_ratios: Float[np.ndarray, " prompts"]
    """log p(x | 1) / p(x | 0) of the prompts fitted to, each from the other folds."""
    predict: Callable[[Float[np.ndarray, "n D"]], Float[np.ndarray, " n"]]
    """The same for further prompts, the mean over the fits."""
    penalty: float
    """The candidate with the lowest held-out loss."""
    heldout_nll: float
    """That loss, nats; log 2 if the classes have the same prompts."""


def fit_density_ratio(
    features: Float[np.ndarray, "prompts D"], counts: Int[np.ndarray, "prompts 2"]
) -> DensityRatio:
    """Fits a classifier by logistic regression, and selects its penalty.

        min over (b, c)   sum_x [n1(x)/2n1 softplus(-s) + n0(x)/2n0 softplus(s)]
                          + penalty / 2 |b|^2,              s = b . x + c

    where n1(x) and n0(x) are how often the prompt x occurs in each class.

    Args:
      features: of distinct prompts in random order, finite.
      counts: how often each occurs in class 0 and in class 1; both classes occur, on at
        least `FOLDS` prompts each.
    """
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale[scale < 1e-6 * max(float(scale.max(initial=0)), 1e-12)] = np.inf
    standardized = lambda x: (x - mean) / scale
    x = standardized(features)
    shares = counts / (2 * counts.sum(0))
    folds = _folds(counts)
    fits = np.zeros((len(PENALTIES), FOLDS, x.shape[1] + 1))
    found = np.zeros((len(PENALTIES), len(x)))
    for fold in range(FOLDS):
        own, b = folds == fold, np.zeros(x.shape[1] + 1)
        for n, penalty in enumerate(PENALTIES):  # each starts from the one before
            b = _logistic(x[~own], shares[~own], penalty, b)
            fits[n, fold], found[n, own] = b, x[own] @ b[:-1] + b[-1]
    losses = [_nll(s, shares) for s in found]
    best = int(np.argmin(losses))
    b = fits[best].mean(0)
    return DensityRatio(
        log_ratios=found[best],
        predict=lambda more: standardized(more) @ b[:-1] + b[-1],
        penalty=PENALTIES[best],
        heldout_nll=losses[best],
    )


def _folds(counts: np.ndarray) -> np.ndarray:
    """Prompts dealt to the folds, those of each class in equal numbers."""
    folds = np.empty(len(counts), np.int64)
    groups = (counts > 0) @ np.array([1, 2])
    for group in range(4):
        own = np.flatnonzero(groups == group)
        folds[own] = np.arange(len(own)) % FOLDS
    return folds


def _nll(s: np.ndarray, shares: np.ndarray) -> float:
    losses = np.logaddexp(0, np.stack([s, -s], axis=1))
    return float(np.sum(shares * losses))


def _logistic(
    x: np.ndarray, shares: np.ndarray, penalty: float, start: np.ndarray
) -> np.ndarray:
    """Coefficients and intercept; both classes get equal weight."""
    from scipy.optimize import minimize  # takes a moment, and few runs need it

    shares = shares / (2 * shares.sum(0))

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        s = x @ b[:-1] + b[-1]
        p = np.exp(-np.logaddexp(0, -s))
        residual = shares[:, 0] * p - shares[:, 1] * (1 - p)
        gradient = np.append(residual @ x + penalty * b[:-1], residual.sum())
        return _nll(s, shares) + penalty / 2 * float(b[:-1] @ b[:-1]), gradient

    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-7}).x
