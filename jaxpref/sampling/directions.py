"""Robust preference selection (RPS): answers for neighboring preferences.

A preference is a direction v in the space of m rewards, and an answer's utility v . r.
Where training has few examples of the target direction, answers written for nearby
directions may serve it better: one answer is sampled for each of several directions
within an angle of the target, and the one with the largest utility under the target is
kept.  arXiv:2510.20498, with 5 directions within 30 degrees.
"""

import numpy as np
from jaxtyping import Float

GRID = 4096
"""Angles at which the distribution of the angle to the target is tabulated."""


def neighboring_directions(
    target: Float[np.ndarray, " m"],
    count: int,
    *,
    max_angle: float,
    rng: np.random.Generator,
) -> Float[np.ndarray, "count m"]:
    """Unit vectors, uniform on the part of the sphere within an angle of the target.

    The angle phi to the target has density proportional to sin(phi)^(m - 2).

    Args:
        target: at least two numbers, not all 0.
        count: how many.
        max_angle: in radians, in [0, pi].
        rng: the source of random numbers.

    Raises:
        ValueError: if the target has no direction, or is in one dimension.
    """
    target = np.asarray(target, float)
    m, norm = len(target), np.linalg.norm(target)
    if m < 2 or not norm > 0:
        raise ValueError(f"target {target}: give at least two numbers, not all 0")
    target = target / norm
    angles = np.linspace(0.0, max_angle, GRID)
    cumulative = np.concatenate([[0.0], np.cumsum(np.sin(_middle(angles)) ** (m - 2))])
    phi = np.interp(rng.random(count) * cumulative[-1], cumulative, angles)
    sideways = rng.normal(size=(count, m))
    sideways -= np.outer(sideways @ target, target)
    sideways /= np.linalg.norm(sideways, axis=1, keepdims=True)
    return np.cos(phi)[:, None] * target + np.sin(phi)[:, None] * sideways


def _middle(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n-1"]:
    return (x[1:] + x[:-1]) / 2
