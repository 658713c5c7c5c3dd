"""Metrics of reward margins, with confidence intervals.

Pure numpy functions in float64 for the host, on all held-out pairs at once.  A margin
is the reward of the chosen answer minus that of the rejected one.  The model's
probability that the label is right is s(margin) = 1 / (1 + exp(-margin)).
"""

import math
import statistics

import numpy as np
from jaxtyping import Float


def accuracy(margins: Float[np.ndarray, " pairs"]) -> float:
    """Share of pairs ordered as labeled; a tie counts 1/2.

    Args:
      margins: reward margins; [pairs].

    Returns:
      A share in [0, 1].

    Raises:
      ValueError: if there is no pair or a margin is NaN.
    """
    return float(np.mean(_hits(_checked(margins))))


def brier_score(margins: Float[np.ndarray, " pairs"]) -> float:
    """Mean squared error of the predicted probability of the label.

        mean (1 - s(margin))^2

    0 is perfect; a constant prediction of 1/2 scores 1/4.

    Args:
      margins: reward margins in nats (beta times log-ratios for DPO); [pairs].

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: if there is no pair or a margin is NaN.

    References:
      Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    return float(np.mean(_sigmoid(-_checked(margins)) ** 2))


def reliability_bins(
    margins: Float[np.ndarray, " pairs"], *, bins: int = 10
) -> list[dict[str, float]]:
    """Accuracy by confidence: the points of a reliability diagram.

    The model prefers the answer with the higher reward, with confidence
    max(p, 1 - p) in [1/2, 1], p = s(margin).  It is right if that is the chosen answer.

    Args:
      margins: reward margins in nats; [pairs].
      bins: equal-width bins of [1/2, 1].

    Returns:
      One record for each non-empty bin, in order: `lower` and `upper` edge, `pairs`,
      mean `confidence`, and `accuracy` (a tie counts 1/2).

    Raises:
      ValueError: if there is no pair, a margin is NaN, or `bins` < 1.
    """
    margins = _checked(margins)
    if bins < 1:
        raise ValueError(f"Expected bins >= 1, got {bins}.")
    confidence, hits = _sigmoid(np.abs(margins)), _hits(margins)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "lower": 0.5 + 0.5 * i / bins,
            "upper": 0.5 + 0.5 * (i + 1) / bins,
            "pairs": int(np.sum(index == i)),
            "confidence": float(np.mean(confidence[index == i])),
            "accuracy": float(np.mean(hits[index == i])),
        }
        for i in np.unique(index)
    ]


def expected_calibration_error(
    margins: Float[np.ndarray, " pairs"], *, bins: int = 10
) -> float:
    """Mean distance between confidence and accuracy over `reliability_bins`.

        sum over bins of  pairs in bin / pairs * |accuracy - confidence|

    Args:
      margins: reward margins in nats; [pairs].
      bins: equal-width bins of the confidences' range [1/2, 1].

    Returns:
      A number in [0, 1]; 0 means calibrated.

    Raises:
      ValueError: if there is no pair, a margin is NaN, or `bins` < 1.

    References:
      Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599,
      Eq. 3.
    """
    records = reliability_bins(margins, bins=bins)
    total = sum(r["pairs"] for r in records)
    return sum(
        r["pairs"] / total * abs(r["accuracy"] - r["confidence"]) for r in records
    )


def wilson_interval(
    share: float, count: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of a proportion, e.g. an accuracy.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    It has the right coverage near 0 and 1 and for small counts, where p -+ z sqrt(p (1
    - p)/n) does not.  Ties that count 1/2 make it slightly too wide, never too narrow.

    Args:
      share: p, the observed share in [0, 1].
      count: n, trials, >= 1.
      confidence: probability of covering the true share, in (0, 1).

    Returns:
      Lower and upper end, in [0, 1].

    Raises:
      ValueError: if an argument is out of range.

    References:
      Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
      1927.
    """
    if not (0 <= share <= 1 and count >= 1):
        raise ValueError(f"Expected a share of >= 1 trials, got {share} of {count}.")
    z = statistics.NormalDist().inv_cdf(0.5 + 0.5 * _level(confidence))
    center = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def bootstrap_interval(
    values: Float[np.ndarray, " samples"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, e.g. of margins or of rewards.

    Args:
      values: independent samples; [samples].
      confidence: probability of covering the true mean, in (0, 1).
      resamples: samples drawn with replacement.
      seed: seed of the resampling; the same seed gives the same interval.

    Returns:
      Lower and upper end.

    Raises:
      ValueError: if there is no value, one is NaN, or `confidence` is out of range.

    References:
      Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    values = _checked(values)
    tail = 0.5 - 0.5 * _level(confidence)
    random = np.random.default_rng(seed)
    # One resample at a time, to save memory.
    means = [
        np.mean(values[random.integers(0, len(values), len(values))])
        for _ in range(resamples)
    ]
    lower, upper = np.quantile(means, [tail, 1 - tail])
    return float(lower), float(upper)


def preference_metrics(margins: Float[np.ndarray, " pairs"]) -> dict[str, float]:
    """All metrics above for one set of held-out pairs, as a flat record.

    Args:
      margins: reward margins in nats; [pairs].

    Returns:
      `pairs`, `rewards/accuracies` with its 95% Wilson interval (`..._low`,
      `..._high`), the mean `rewards/margins` with its 95% bootstrap interval,
      `calibration/ece`, and `calibration/brier`.

    Raises:
      ValueError: if there is no pair or a margin is NaN.
    """
    margins = _checked(margins)
    share = accuracy(margins)
    accuracy_low, accuracy_high = wilson_interval(share, len(margins))
    margin_low, margin_high = bootstrap_interval(margins)
    return {
        "pairs": len(margins),
        "rewards/accuracies": share,
        "rewards/accuracies_low": accuracy_low,
        "rewards/accuracies_high": accuracy_high,
        "rewards/margins": float(np.mean(margins)),
        "rewards/margins_low": margin_low,
        "rewards/margins_high": margin_high,
        "calibration/ece": expected_calibration_error(margins),
        "calibration/brier": brier_score(margins),
    }


def _checked(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or np.isnan(values).any():
        raise ValueError(
            "Expected one number per pair, at least one and none of them NaN, got "
            f"shape {values.shape} with {np.isnan(values).sum()} NaN."
        )
    return values


def _level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence in (0, 1), got {confidence}.")
    return confidence


def _hits(margins: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(margins)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    # The argument of exp is never positive, so it cannot overflow.
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)
