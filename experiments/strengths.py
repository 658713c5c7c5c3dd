"""Bradley-Terry strengths of arguments from text and votes: a mixed model.

An argument i of topic t has the strength

    q = f . w + u,    w ~ N(0, I),    u ~ N(0, spread)

f are the features of its text, w is shared by all topics, and u is individual.  The
logit of "the first of a pair is better" is the margin m = q_first - q_second.  An
argument occurs in about thirty pairs of its topic, so u pools the votes on it.  A topic
without votes is judged by the text alone.  With a spread near zero, this is logistic
regression.
"""

import dataclasses

import numpy as np

ALONE = 1e-6
"""The spread in a model of the text alone."""


@dataclasses.dataclass(frozen=True)
class Strengths:
    """The posterior mode of w and u; T topics of up to S arguments."""

    w: np.ndarray
    """float [D]."""
    u: np.ndarray
    """float [T, S]."""


def zeros(features: np.ndarray) -> Strengths:
    """The starting point of `fit`."""
    return Strengths(np.zeros(features.shape[2]), np.zeros(features.shape[:2]))


def margins(strengths: Strengths, features, at) -> np.ndarray:
    """The margins m of pairs; `at` is (topic, first, second), each int [P]."""
    topic, first, second = at
    q = features @ strengths.w + strengths.u
    return q[topic, first] - q[topic, second]


def fit(
    features: np.ndarray,
    at,
    soft: np.ndarray,
    weights: np.ndarray,
    *,
    spread: float,
    start: Strengths,
    max_iterations: int = 25,
) -> Strengths:
    """The posterior mode, by Newton's method.

        log-posterior = sum weight [soft log s(m) + (1 - soft) log s(-m)]
                        - |w|^2 / 2 - |u|^2 / (2 spread)

    Args:
      features: [T, S, D].
      at: (topic, first, second) of the P pairs.
      soft: [P], probability that the first is better.
      weights: [P]; 0 for pairs of held-out topics.
      spread: variance of u.
      start: the starting point.
      max_iterations: maximum Newton steps; stops earlier once the objective converges.
    """

    def objective(x: Strengths) -> float:
        m = margins(x, features, at)
        fits = -np.logaddexp(0, -m) - (1 - soft) * m
        return weights @ fits - x.w @ x.w / 2 - np.sum(x.u**2) / (2 * spread)

    x, last = start, objective(start)
    for _ in range(max_iterations):
        p = _sigmoid(margins(x, features, at))
        pull = _per_argument(features, at, weights * (soft - p))
        laplacian = _laplacian(features, at, weights * p * (1 - p))
        own, shared, (inverse_f, inverse_u) = _eliminated(
            features, laplacian, pull - x.u / spread, spread
        )
        gradient = np.einsum("tsd,ts->d", features, pull) - x.w
        lf = laplacian @ features
        step_w = np.linalg.solve(
            shared, gradient - np.einsum("tsd,ts->d", lf, inverse_u)
        )
        step_u = inverse_u - inverse_f @ step_w
        size = 1.0
        while True:
            new = Strengths(x.w + size * step_w, x.u + size * step_u)
            value = objective(new)
            if value >= last or size < 1e-3:
                break
            size /= 2
        gain, x, last = value - last, new, value
        if gain < 1e-5 * abs(last):
            break
    return x


def variances(features, at, precision, *, spread: float) -> np.ndarray:
    """Posterior variance of the margins, [P], by Laplace's approximation.

    `precision` [P] is minus the second derivative of each pair's log-likelihood with
    respect to its margin.
    """
    laplacian = _laplacian(features, at, precision)
    own, shared, (inverse_f, _) = _eliminated(
        features, laplacian, np.zeros(features.shape[:2]), spread
    )
    rest = features - inverse_f
    covariance = rest @ np.linalg.inv(shared) @ rest.swapaxes(1, 2) + own
    topic, first, second = at
    return (
        covariance[topic, first, first]
        + covariance[topic, second, second]
        - 2 * covariance[topic, first, second]
    )


def cavity(features, at, margin, evidence, trains, *, spread: float) -> np.ndarray:
    """Margins without the pair's own votes, shrunk by their uncertainty.

        log-likelihood of the votes of a pair    log [s(m) s(v) + s(-m) s(-v)] + const
        gradient g = s(m + v) - s(m),   precision h = s'(m) - s'(m + v)
        variance without it V' = V / (1 - h V),   margin without it m' = m - V' g

    v is the logit of the votes, V the margin's posterior variance.  The
    result is m' / sqrt(1 + pi V' / 8), whose s is about E s(m').
    """
    p, r = _sigmoid(margin), _sigmoid(margin + evidence)
    precision = np.maximum(p * (1 - p) - r * (1 - r), 1e-3) * trains
    variance = variances(features, at, precision, spread=spread)
    without = variance / np.maximum(1 - precision * variance, 0.1)
    shifted = margin - without * (r - p) * trains
    return shifted / np.sqrt(1 + np.pi * without / 8)


def _eliminated(features, laplacian, right, spread: float):
    """Inverse of the Hessian in u, Schur complement in w, and solution for u's part.

    One block of u per topic, so a step costs T S^3 and D^3 instead of (T S + D)^3.
    """
    size = features.shape[1]
    own = np.linalg.inv(laplacian + np.eye(size) / spread)
    lf = laplacian @ features
    inverse_f = own @ lf
    schur = np.einsum("tsd,tse->de", lf, features - inverse_f, optimize=True)
    shared = np.eye(features.shape[2]) + schur
    return own, shared, (inverse_f, np.einsum("tij,tj->ti", own, right))


def _laplacian(features, at, values) -> np.ndarray:
    """Sum over pairs of value (e_first - e_second)(e_first - e_second)'; [T, S, S]."""
    topics, size = features.shape[:2]
    topic, first, second = at
    cell = (topic * size + first) * size + second
    off = np.bincount(cell, values, topics * size**2).reshape(topics, size, size)
    off = off + off.swapaxes(1, 2)
    return off.sum(2)[..., None] * np.eye(size) - off


def _per_argument(features, at, values) -> np.ndarray:
    topics, size = features.shape[:2]
    topic, first, second = at
    count = lambda place: np.bincount(topic * size + place, values, topics * size)
    return (count(first) - count(second)).reshape(topics, size)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
