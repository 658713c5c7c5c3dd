"""Metrics of the rewards of single answers that are labeled desirable or not.

Pure numpy functions in float64 for the host, on all answers at once.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.evaluate.bootstrap import prompt_bootstrap

Answers = Float[np.ndarray, " answers"]


def answer_metrics(
    rewards: Answers,
    desirable: Bool[np.ndarray, " answers"],
    prompts: Int[np.ndarray, " answers"],
) -> dict[str, float]:
    """How well rewards separate desirable answers from the others.

        auroc      P(r > r') + P(r = r') / 2,    r desirable and r' not
        threshold  midway between the mean rewards of both classes, as in BCO
        accuracy   share of answers above it if desirable, below it if not; a tie is 1/2

    Rewards of different prompts are compared with each other, so that the AUROC is
    below 1 if prompts differ in their rewards, even if the order within each is right.
    The threshold is chosen on the answers that it is applied to.

    Args:
      rewards: of each answer, in nats if they are beta times log-ratios; [answers].
      desirable: the label of each; [answers].
      prompts: a number that answers to the same prompt share; [answers].

    Returns:
      `answers`; `prompts`; `desirable`, the share of these; `rewards/auroc`,
      `rewards/accuracies` and `rewards/margins`, the mean reward of desirable answers
      minus that of the others, with 95% bootstrap intervals over prompts (`..._low`,
      `..._high`); `rewards/threshold`; and `majority/accuracies`, that of always
      naming the more frequent label.

    Raises:
      ValueError: if shapes differ, a reward is NaN, or one of the classes is missing.

    References:
      Jung et al., "Binary Classifier Optimization for Large Language Model Alignment",
      2024, arXiv:2404.04656, the reward shift (the threshold).
    """
    rewards, desirable = np.asarray(rewards, np.float64), np.asarray(desirable, bool)
    if not rewards.shape == desirable.shape == np.shape(prompts):
        raise ValueError(
            f"Expected equal shapes [answers], got {rewards.shape}, {desirable.shape}, "
            f"and {np.shape(prompts)}."
        )
    if np.isnan(rewards).any() or len(set(desirable.tolist())) < 2:
        raise ValueError("Expected rewards that are not NaN, and labels of both kinds.")
    area = weighted_auroc(rewards, desirable)

    def statistics(weights: Answers) -> dict[str, float]:
        good, bad = _class_means(rewards, desirable, weights)
        hits = 0.5 + 0.5 * np.sign(rewards - (good + bad) / 2) * (2 * desirable - 1)
        return {
            "rewards/auroc": area(weights),
            "rewards/accuracies": float(weights @ hits / weights.sum()),
            "rewards/margins": good - bad,
        }

    good, bad = _class_means(rewards, desirable, np.ones(len(rewards)))
    share = float(desirable.mean())
    return {
        "answers": len(rewards),
        "prompts": len(np.unique(prompts)),
        "desirable": share,
        **prompt_bootstrap(statistics, prompts),
        "rewards/threshold": (good + bad) / 2,
        "majority/accuracies": max(share, 1 - share),
    }


def weighted_auroc(
    scores: Answers, positive: Bool[np.ndarray, " answers"]
) -> Callable[[Answers], float]:
    """`auroc(weights)` of weighted answers: P(positive scores higher); a tie is 1/2.

    The answers are sorted once, for all weights.  NaN if a class has no weight.
    """
    values, place = np.unique(scores, return_inverse=True)

    def auroc(weights: Answers) -> float:
        at = lambda chosen: np.bincount(place, weights * chosen, minlength=len(values))
        ones, zeros = at(positive), at(~positive)
        total = ones.sum() * zeros.sum()
        below = np.cumsum(zeros) - zeros / 2
        return float(ones @ below / total) if total else float("nan")

    return auroc


def _class_means(rewards, desirable, weights) -> tuple[float, float]:
    """Mean rewards of desirable answers and of the others; NaN without any weight."""
    of = lambda chosen: weights[chosen].sum()
    mean = lambda chosen: (
        float(weights[chosen] @ rewards[chosen] / of(chosen)) if of(chosen) else np.nan
    )
    return mean(desirable), mean(~desirable)
