"""Two models on the same records: the difference of their accuracies."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.bootstrap import prompt_bootstrap

Hits = Float[np.ndarray, " records"]


def paired_metrics(
    hits: Hits, baseline: Hits, prompts: Int[np.ndarray, " records"]
) -> Mapping[str, float]:
    """How a model compares with a baseline on the same records.

    Records on which both are right, or both are wrong, tell nothing apart, so the
    interval is narrower than those of the two accuracies suggest.

    Args:
      hits: how right the model is about each record, from 0 to 1; [records].
      baseline: the same of the baseline; [records].
      prompts: a number that records of the same prompt share; [records].

    Returns:
      `count`; `accuracy` and `baseline_accuracy`; their `difference`, with the ends of
      its 95% paired bootstrap interval over prompts, `difference_low` and
      `difference_high`; `only_model` and `only_baseline`, the records that only one of
      them gets entirely right and the other entirely wrong; and `mcnemar_p`, the
      two-sided p-value of `mcnemar_exact` for these.

    Raises:
      ValueError: if shapes differ, or there is no record.
    """
    hits, baseline = np.asarray(hits, np.float64), np.asarray(baseline, np.float64)
    if not hits.shape == baseline.shape == np.shape(prompts):
        raise ValueError(
            f"Expected equal shapes [records], got {hits.shape}, {baseline.shape}, and "
            f"{np.shape(prompts)}."
        )
    delta = hits - baseline
    mean = lambda weights: {"difference": float(weights @ delta / weights.sum())}
    only_model, only_baseline = int(np.sum(delta == 1)), int(np.sum(delta == -1))
    return {
        "count": len(hits),
        "accuracy": float(hits.mean()),
        "baseline_accuracy": float(baseline.mean()),
        **prompt_bootstrap(mean, prompts),
        "only_model": only_model,
        "only_baseline": only_baseline,
        "mcnemar_p": mcnemar_exact(only_model, only_baseline),
    }


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test.

        p = min(1, 2 sum over k <= min(b, c) of  C(b + c, k) / 2^(b + c))

    If both models are equally good, each record on which they disagree is as likely to
    favor either.

    Args:
      only_first: b, records that only the first gets right.
      only_second: c, records that only the second gets right.

    Returns:
      A number in (0, 1].

    References:
      McNemar, "Note on the sampling error of the difference between correlated
      proportions or percentages", 1947.
      Dietterich, "Approximate Statistical Tests for Comparing Supervised Classification
      Learning Algorithms", 1998, section 3.1.
    """
    count = only_first + only_second
    term = total = 1  # exact integers, however many records there are
    for k in range(min(only_first, only_second)):
        term = term * (count - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**count)
