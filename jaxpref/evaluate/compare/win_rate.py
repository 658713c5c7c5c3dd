"""Win rates of a model against another, and how consistent the judge is."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.bootstrap import prompt_bootstrap

PerPrompt = Float[np.ndarray, " prompts"]


def win_rate(
    preferences: PerPrompt,
    prompts: Int[np.ndarray, " prompts"],
    *,
    weights: PerPrompt | None = None,
    tie_margin: float = 0.0,
) -> Mapping[str, float]:
    """The share of the prompts on which a model wins, with a 95% interval.

        win_rate           sum w p / sum w
        discrete_win_rate  wins + ties / 2,    as shares weighted by w

    p is the judge's probability that the model's answer is better, or 1, 1/2 or 0.  A
    prompt is a win if p > 1/2 + m, a loss if p < 1/2 - m, and a tie otherwise.

    Args:
      preferences: p of each comparison, in [0, 1]; [prompts].
      prompts: a number that comparisons on the same prompt share; [prompts].
      weights: w, how often each comparison counts; None means once; [prompts].
      tie_margin: m, in [0, 1/2].

    Returns:
      `win_rate` and `discrete_win_rate` with the ends of their bootstrap intervals over
      prompts (`..._low`, `..._high`); and the shares `wins`, `losses` and `ties`.

    Raises:
      ValueError: if there is no comparison, or one is NaN.

    References:
      Dubois et al., "AlpacaFarm", 2023, arXiv:2305.14387 (the win rate).
    """
    preferences = np.asarray(preferences, np.float64)
    if not len(preferences) or np.isnan(preferences).any():
        raise ValueError("Expected at least one preference, and none that is NaN.")
    own = np.ones(len(preferences)) if weights is None else np.asarray(weights)
    far = preferences - 0.5
    won, lost = far > tie_margin, far < -tie_margin
    points = 0.5 + 0.5 * (won.astype(float) - lost)

    def statistics(times: PerPrompt) -> dict[str, float]:
        count = times * own
        mean = lambda x: float(count @ x / count.sum())
        return {"win_rate": mean(preferences), "discrete_win_rate": mean(points)}

    share = lambda x: float(own @ x / own.sum())
    return {
        **prompt_bootstrap(statistics, prompts),
        "wins": share(won),
        "losses": share(lost),
        "ties": share(~won & ~lost),
    }


def swap_metrics(first: PerPrompt, second: PerPrompt) -> Mapping[str, float]:
    """How much a judge's verdicts depend on which answer it reads first.

    Args:
      first: its probability that the model's answer is better, when that answer is
        first; [prompts].
      second: the same, when that answer is second; [prompts].

    Returns:
      `consistency`, the share of comparisons with the same verdict in both orders; and
      `first_position`, the mean probability of whichever answer is first: 1/2 for a
      judge without a preference for a position.

    References:
      Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", 2023,
      arXiv:2306.05685, section 3.3 (position bias).
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return {
        "consistency": float(np.mean(np.sign(first - 0.5) == np.sign(second - 0.5))),
        "first_position": float(np.mean((first + 1 - second) / 2)),
    }


def consistent(first: PerPrompt, second: PerPrompt) -> PerPrompt:
    """The verdict 1 or 0 if both orders agree on it, and else 1/2; [prompts]."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    signs = np.sign(first - 0.5)
    return np.where(signs == np.sign(second - 0.5), 0.5 + 0.5 * signs, 0.5)
