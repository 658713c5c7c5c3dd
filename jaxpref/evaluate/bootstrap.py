"""Bootstrap intervals of statistics of records that share prompts."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

Statistics = Callable[[Float[np.ndarray, " records"]], Mapping[str, float]]
"""`statistics(weights)`: statistics of weighted records, by name."""


def prompt_bootstrap(
    statistics: Statistics,
    prompts: Int[np.ndarray, " records"],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Statistics with percentile bootstrap intervals over prompts.

    Prompts are drawn with replacement, with all of their records, because records of
    one prompt are not independent.  With a single prompt, the intervals have length 0.

    Args:
      statistics: gives the statistics of records with weights, the number of times
        that each was drawn.
      prompts: a number that records of the same prompt share; [records].
      confidence: probability of covering the true value, in (0, 1).
      resamples: samples drawn with replacement.
      seed: seed of the resampling; the same seed gives the same intervals.

    Returns:
      Each statistic of all records, and the ends of its interval, `..._low` and
      `..._high`.  Samples in which a statistic is NaN, because a class is missing, are
      left out of its interval.

    Raises:
      ValueError: if there is no record, or `confidence` is out of range.

    References:
      Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
      Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8
      (resampling of clusters).
    """
    if not len(prompts):
        raise ValueError("Expected at least one record, got none.")
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence in (0, 1), got {confidence}.")
    _, cluster = np.unique(prompts, return_inverse=True)
    count, tail = int(cluster.max()) + 1, 0.5 - 0.5 * confidence
    random = np.random.default_rng(seed)
    found = statistics(np.ones(len(prompts)))
    drawn = np.empty((resamples, len(found)))
    for n in range(resamples):
        times = np.bincount(random.integers(count, size=count), minlength=count)
        drawn[n] = [*statistics(times[cluster].astype(float)).values()]
    with_ends = {}
    for (name, value), column in zip(found.items(), drawn.T):
        known = column[~np.isnan(column)]
        ends = np.quantile(known, [tail, 1 - tail]) if len(known) else [np.nan] * 2
        values = (float(x) for x in (value, *ends))
        with_ends |= zip((name, f"{name}_low", f"{name}_high"), values)
    return with_ends
