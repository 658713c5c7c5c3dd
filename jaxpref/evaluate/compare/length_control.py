"""AlpacaEval's length-controlled win rate."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.crossfit import sigmoid

PerPrompt = Float[np.ndarray, " prompts"]

PENALTIES = np.logspace(-4, 4, 10)
"""Candidates for C."""
FOLDS = 5
STEPS = 100
TOLERANCE = 1e-8
"""Largest change of a coefficient at which a fit ends."""


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """A fitted model of the judge's preferences."""

    win_rate: float
    """The win rate if answers were equally long, in [0, 1]."""
    interval: tuple[float, float]
    """Its 95% bootstrap interval."""
    model: float
    """theta: the log-odds of winning at equal lengths, on an instruction of difficulty
    0."""
    length: float
    """phi: how the log-odds change with the length."""
    difficulty: float | None
    """psi: how they change with the difficulty of the instruction; None without
    difficulties."""
    penalty: float
    """C, chosen by cross-validation."""


def length_controlled_win_rate(
    preferences: PerPrompt,
    lengths: PerPrompt,
    baseline_lengths: PerPrompt,
    *,
    prompts: Int[np.ndarray, " prompts"] | None = None,
    difficulties: PerPrompt | None = None,
    weights: PerPrompt | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> LengthControlled:
    """The win rate of a model against a baseline if all answers were equally long.

    The judge's preferences are described by a generalized linear model,

        p_i = s(theta + phi tanh(d_i / sd(d)) + psi g_i)

    with d_i the model's length minus the baseline's.  It minimizes

        |theta| + |phi| + |psi| + C sum_i w_i H(y_i, p_i),    H the cross-entropy

    with C from five-fold cross-validation.  The win rate is the mean of s(theta + psi
    g_i), at d = 0.  This is the formula, the penalty and the cross-validation of
    AlpacaEval 2.  Its published numbers also regularize toward prompted variants of its
    own baseline, with data that only its own prompts have, so they differ from these.

    Args:
      preferences: y, the judge's probability that the model's answer is better, or 1,
        1/2 or 0; [prompts].
      lengths: of the model's answers, in characters; [prompts].
      baseline_lengths: of the baseline's; [prompts].
      prompts: a number that comparisons on the same prompt share; None if all are on
        different ones; [prompts].
      difficulties: g, of AlpacaEval's instructions; None leaves the term out;
        [prompts].
      weights: w, how often each comparison counts; None means once; [prompts].
      resamples: samples of prompts, drawn with replacement, for the interval.
      seed: seed of the resampling.

    Raises:
      ValueError: if shapes differ, or a preference is not in [0, 1].

    References:
      Dubois et al., "Length-Controlled AlpacaEval", 2024, arXiv:2404.04475, Eq. 2 and
      section 3.
    """
    y = np.asarray(preferences, np.float64)
    longer = np.subtract(lengths, baseline_lengths, dtype=np.float64)
    if not (y.shape == longer.shape and np.all((y >= 0) & (y <= 1))):
        raise ValueError(
            f"Expected preferences in [0, 1], and as many lengths, got {y.shape} and "
            f"{longer.shape}."
        )
    spread = np.std(longer, ddof=1) if len(y) > 1 else 0.0
    columns = [np.ones(len(y)), np.tanh(longer / (spread or 1.0))]
    if difficulties is not None:
        columns.append(np.asarray(difficulties, np.float64))
    features = np.stack(columns, axis=1)
    at_equal = features.copy()
    at_equal[:, 1] = 0
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    own = np.arange(len(y)) if prompts is None else prompts
    cluster = np.unique(own, return_inverse=True)[1]
    penalty = chosen_penalty(features, y, w, cluster % FOLDS)
    fitted = fit(features, y, w, penalty=penalty)

    def statistics(times: PerPrompt) -> dict[str, float]:
        often = w * times
        own = fit(features, y, often, penalty=penalty, start=fitted)
        return {"win": float(np.average(sigmoid(at_equal @ own), weights=often))}

    ends = prompt_bootstrap(statistics, cluster, resamples=resamples, seed=seed)
    return LengthControlled(
        float(np.average(sigmoid(at_equal @ fitted), weights=w)),
        (ends["win_low"], ends["win_high"]),
        *map(float, fitted[:2]),
        difficulty=None if difficulties is None else float(fitted[2]),
        penalty=penalty,
    )


def chosen_penalty(
    features: Float[np.ndarray, "prompts features"],
    y: PerPrompt,
    weights: PerPrompt,
    folds: Int[np.ndarray, " prompts"],
) -> float:
    """C of `PENALTIES` with the least cross-entropy on the other folds."""
    losses = np.zeros(len(PENALTIES))
    for fold in np.unique(folds):
        train = folds != fold
        if not (weights[train] > 0).any():
            continue
        start = np.zeros(features.shape[1])
        for n, penalty in enumerate(PENALTIES):
            start = fit(features[train], y[train], weights[train], penalty, start)
            scores = features[~train] @ start
            losses[n] += weights[~train] @ _cross_entropy(y[~train], scores)
    return float(PENALTIES[int(np.argmin(losses))])


def fit(
    features: Float[np.ndarray, "prompts features"],
    y: PerPrompt,
    weights: PerPrompt,
    penalty: float,
    start: Float[np.ndarray, " features"] | None = None,
) -> Float[np.ndarray, " features"]:
    """The coefficients b that minimize |b|_1 + C sum w H(y, s(x b)).

    Each step minimizes |b|_1 plus a quadratic approximation of the rest (proximal
    Newton), and is halved until the objective falls.
    """
    w = weights / weights.sum()
    l1 = 1 / (penalty * weights.sum())  # divided by C and the sum of the weights
    objective = lambda b: w @ _cross_entropy(y, features @ b) + l1 * np.abs(b).sum()
    b = np.zeros(features.shape[1]) if start is None else np.array(start, np.float64)
    value = objective(b)
    for _ in range(STEPS):
        p = sigmoid(features @ b)
        gradient = features.T @ (w * (p - y))
        hessian = (features * (w * p * (1 - p))[:, None]).T @ features
        hessian += 1e-9 * np.eye(len(b))
        step = _lasso(hessian, hessian @ b - gradient, l1, b) - b
        while (lower := objective(b + step)) > value and np.abs(step).max() > TOLERANCE:
            step /= 2
        if lower > value or np.abs(step).max() <= TOLERANCE:
            break
        b, value = b + step, lower
    return b


def _lasso(
    hessian: np.ndarray, linear: np.ndarray, l1: float, start: np.ndarray
) -> np.ndarray:
    """Minimizes b'Hb / 2 - b'c + l1 |b|_1 by coordinate descent."""
    b = start.copy()
    for _ in range(STEPS):
        before = b.copy()
        for k in range(len(b)):
            rest = linear[k] - hessian[k] @ b + hessian[k, k] * b[k]
            b[k] = np.sign(rest) * max(abs(rest) - l1, 0) / hessian[k, k]
        if np.abs(b - before).max() <= TOLERANCE:
            break
    return b


def _cross_entropy(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """-y log s(scores) - (1 - y) log(1 - s(scores))."""
    return np.logaddexp(0, scores) - y * scores
