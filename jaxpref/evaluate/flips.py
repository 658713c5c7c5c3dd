"""Checks of an audit: agreement with labels by confidence, and known flips."""

import numpy as np

from jaxpref.evaluate.metrics import accuracy, wilson_interval


def agreement_bins(margins: np.ndarray, *, bins: int = 10) -> list[dict[str, float]]:
    """How often labels agree with the model, binned by confidence (equal counts).

    Args:
      margins: calibrated margins, positive where the model agrees with the label; [N].
      bins: number of bins, at most one per pair.

    Returns:
      `pairs`, mean `confidence`, `agreement` (a tie counts 1/2), and the ends `low` and
      `high` of its 95% interval.
    """
    parts = np.array_split(np.argsort(np.abs(margins)), min(bins, len(margins)))
    records = []
    for part in parts:
        share = accuracy(margins[part])
        low, high = wilson_interval(share, len(part))
        confidence = np.mean(1 / (1 + np.exp(-np.abs(margins[part]))))
        records.append(
            {
                "pairs": len(part),
                "confidence": float(confidence),
                "agreement": share,
                "low": low,
                "high": high,
            }
        )
    return records


def known_flips(
    posterior: np.ndarray, margins: np.ndarray, flips: np.ndarray
) -> dict[str, float]:
    """How well an audit found known flips (field `flip`), which it does not use.

    Returns:
      `pairs`, `base_rate`, `auroc` of 1 - posterior, and for the 10% most suspicious
      pairs the `precision` and its `lift` over the base rate.
    """
    order = np.lexsort((margins, posterior))
    top = order[: max(1, len(order) // 10)]
    base, precision = float(np.mean(flips)), float(np.mean(flips[top]))
    return {
        "pairs": len(flips),
        "base_rate": base,
        "auroc": auroc(-posterior, flips),
        "precision": precision,
        "lift": precision / base if base else float("nan"),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores higher than a negative; a tie counts 1/2.

    NaN unless both classes occur.
    """
    _, rank, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Mean rank of each value.
    below = np.cumsum(counts) - counts + (counts + 1) / 2
    ones, zeros = int(np.sum(positive)), int(np.sum(~positive))
    if not ones or not zeros:
        return float("nan")
    return float((below[rank][positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))
