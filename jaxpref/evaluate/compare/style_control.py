"""Strengths of many models by Bradley-Terry, with and without control for style."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.crossfit import sigmoid

STYLE = ("length", "headings", "list_items", "bold")
"""The features of style, in the order of `style_features`."""
HEADING = re.compile(r"^#{1,6}\s", re.MULTILINE)
LIST_ITEM = re.compile(r"^[ \t]*(?:\d+\.|[-*+])[ \t]", re.MULTILINE)
BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
ELO = 400 / np.log(10)
"""Elo points in a unit of log-odds."""
STEPS = 100
"""Maximum steps of Newton's method."""


@dataclasses.dataclass(frozen=True)
class Strengths:
    """Fitted strengths of models."""

    ratings: Float[np.ndarray, " models"]
    """In Elo points; their mean is 1000."""
    low: Float[np.ndarray, " models"]
    high: Float[np.ndarray, " models"]
    """The ends of their 95% bootstrap intervals."""
    coefficients: Float[np.ndarray, " features"]
    """How the log-odds of winning change with each feature, in units of its root mean
    square."""


def style_features(answers: Sequence[str]) -> Float[np.ndarray, "answers features"]:
    """Characters, Markdown headings, list items, and bold passages of answers."""
    counts = [
        [len(x), *(len(y.findall(x)) for y in (HEADING, LIST_ITEM, BOLD))]
        for x in answers
    ]
    return np.array(counts, np.float64).reshape(-1, len(STYLE))


def style_differences(
    first: Float[np.ndarray, "battles features"],
    second: Float[np.ndarray, "battles features"],
) -> Float[np.ndarray, "battles features"]:
    """Relative differences in style, scaled to a mean square of 1.

        x = (f - f') / (f + f' + 1),    over its root mean square

    A feature that never differs is 0.  The mean stays: which answer is first is a
    matter of convention, so two answers of the same style must have x = 0.

    References:
      Li, Angelopoulos and Chiang, "Does style matter? Disentangling style and substance
      in Chatbot Arena", LMSYS, 2024.
    """
    x = (first - second) / (first + second + 1)
    spread = np.sqrt(np.mean(x**2, axis=0))
    return x / np.where(spread > 0, spread, 1)


def bradley_terry(
    battles: Int[np.ndarray, "battles 2"],
    preferences: Float[np.ndarray, " battles"],
    prompts: Int[np.ndarray, " battles"],
    *,
    models: int,
    style: Float[np.ndarray, "battles features"] | None = None,
    weights: Float[np.ndarray, " battles"] | None = None,
    ridge: float = 1e-3,
    resamples: int = 100,
    seed: int = 0,
) -> Strengths:
    """Strengths of models from comparisons of two answers each.

        min  sum w H(y, s(r_a - r_b + x'c)) + ridge / 2 (|r|^2 + |c|^2)

    A model that wins every battle would have an infinite strength; the ridge keeps it
    finite, and makes the mean strength 0.

    Args:
      battles: the indices of the two models, [battles, 2].
      preferences: y, the probability that the first answer is better, or 1, 1/2 or 0;
        [battles].
      prompts: a number that battles on the same prompt share; [battles].
      models: the number of models.
      style: x, from `style_differences`; None for no control; [battles, features].
      weights: w, how often each battle counts; None means once; [battles].
      ridge: the penalty.
      resamples: samples of prompts, drawn with replacement, for the intervals.
      seed: seed of the resampling.

    References:
      Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952.
      Chiang et al., "Chatbot Arena", 2024, arXiv:2403.04132, section 5.
    """
    battles, y = np.asarray(battles), np.asarray(preferences, np.float64)
    design = np.zeros((len(y), models))
    rows = np.arange(len(y))
    design[rows, battles[:, 0]] += 1
    design[rows, battles[:, 1]] -= 1
    if style is not None:
        design = np.concatenate([design, style], axis=1)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    fitted = _fit(design, y, w, ridge, np.zeros(design.shape[1]))

    def statistics(times: np.ndarray) -> dict[str, float]:
        own = _fit(design, y, w * times, ridge, fitted)[:models]
        return {str(n): float(x) for n, x in enumerate(own)}

    found = prompt_bootstrap(statistics, prompts, resamples=resamples, seed=seed)
    ends = (
        np.array([found[f"{n}_{x}"] for n in range(models)]) for x in ("low", "high")
    )
    ratings, low, high = (1000 + ELO * x for x in (fitted[:models], *ends))
    return Strengths(ratings, low, high, fitted[models:])


def _fit(
    design: np.ndarray, y: np.ndarray, w: np.ndarray, ridge: float, start: np.ndarray
) -> np.ndarray:
    """The minimum by Newton's method, with steps halved until the objective falls."""

    def objective(found: np.ndarray) -> float:
        scores = design @ found
        entropy = np.logaddexp(0, scores) - y * scores
        return float(w @ entropy + ridge / 2 * found @ found)

    found, value = start, objective(start)
    for _ in range(STEPS):
        p = sigmoid(design @ found)
        gradient = design.T @ (w * (p - y)) + ridge * found
        hessian = (design * (w * p * (1 - p))[:, None]).T @ design
        step = -np.linalg.solve(hessian + ridge * np.eye(len(found)), gradient)
        while (lower := objective(found + step)) > value and abs(step).max() > 1e-9:
            step = step / 2
        if lower > value or abs(step).max() <= 1e-9:
            break
        found, value = found + step, lower
    return found
