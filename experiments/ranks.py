"""Rank correlation and the area under the ROC curve."""

import numpy as np


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; NaN if all of `a` or `b` are equal."""
    a, b = ranks(a), ranks(b)
    if not (np.ptp(a) and np.ptp(b)):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values get their mean rank."""
    _, place, count = np.unique(np.round(x, 7), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: P(a positive scores higher); ties count 1/2."""
    rank, n = ranks(scores), int(positive.sum())
    return float((rank[positive].sum() - n * (n - 1) / 2) / (n * (len(rank) - n)))
