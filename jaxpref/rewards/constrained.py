"""One reward as large as possible, while others are at least as large as required."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

STEPS = 200
TOLERANCE = 1e-6
"""By how much a mean may miss its threshold, in standard deviations of its reward."""
LARGEST = 1e6
"""Multipliers beyond this mean that the thresholds cannot be reached."""


def lagrange_multipliers(
    objective: Sequence[Float[np.ndarray, " K"]],
    constraints: Sequence[Sequence[Float[np.ndarray, " K"]]],
    thresholds: Sequence[float],
    *,
    beta: float,
) -> Float[np.ndarray, " C"]:
    """Multipliers of the constraints under the best policy near the reference.

    The policy that maximizes the mean of r_0 - beta KL(policy | reference), under the
    constraints that the mean of each other reward r_c is at least t_c, is proportional
    to reference * exp((r_0 + sum of m_c r_c) / beta).  The multipliers minimize the
    dual, which is convex and has a closed form:

        min over m >= 0   mean over x of
            beta log mean over y of exp((r_0 + sum over c of m_c (r_c - t_c)) / beta)

    So r_0 + sum of m_c r_c is the single reward to maximize.  Computed by Newton's
    method on the multipliers that are positive.

    Args:
      objective: r_0 of the answers to each prompt, samples of the reference.
      constraints: for each of C constraints, r_c of the same answers.
      thresholds: t_c, in the units of r_c.
      beta: the coefficient of the KL divergence, in the units of r_0, > 0.

    Returns:
      The multipliers m, >= 0; 0 where the constraint holds without it.

    Raises:
      ValueError: if no choice of answers reaches all thresholds.

    References:
      Huang et al., "One-Shot Safety Alignment for Large Language Models via Optimal
      Dualization", 2024, arXiv:2405.19544; Moskovitz et al., "Confronting Reward Model
      Overoptimization with Constrained RLHF", 2023, arXiv:2310.04373, for thresholds of
      several rewards.
    """
    sizes = np.array([len(x) for x in objective])
    prompt = np.repeat(np.arange(len(sizes)), sizes)
    base = np.concatenate([np.asarray(x, float) for x in objective]) / beta
    surplus = np.stack(
        [
            np.concatenate(own) - t
            for own, t in zip(constraints, thresholds, strict=True)
        ],
        axis=1,
    )
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def dual(m):
        """The value, its gradient, and its Hessian."""
        logits = base + surplus @ m / beta
        top = np.maximum.reduceat(logits, starts)[prompt]
        raw = np.exp(logits - top)
        total = np.add.reduceat(raw, starts)
        share = raw / total[prompt]
        value = beta * np.mean(np.log(total / sizes) + top[starts])
        means = np.add.reduceat(share[:, None] * surplus, starts)
        centered = surplus - means[prompt]
        hessian = (share[:, None] * centered).T @ centered / len(sizes) / beta
        return value, means.mean(axis=0), hessian

    found = np.zeros(len(thresholds))
    value, gradient, hessian = dual(found)
    near = TOLERANCE * np.maximum(surplus.std(axis=0), 1e-12)
    for _ in range(STEPS):
        free = (found > 0) | (gradient < 0)
        if np.all(np.where(found > 0, np.abs(gradient), -gradient) < near):
            return found
        ridge = 1e-12 + 1e-9 * np.trace(hessian)
        step = np.zeros_like(found)
        inner = hessian[np.ix_(free, free)] + ridge * np.eye(free.sum())
        step[free] = -np.linalg.solve(inner, gradient[free])
        for halvings in range(100):
            moved = np.maximum(found + step / 2**halvings, 0.0)
            after = dual(moved)
            if after[0] <= value + 1e-4 * gradient @ (moved - found) + 1e-14:
                break
        found, (value, gradient, hessian) = moved, after
        if found.max() > LARGEST:
            break
    raise ValueError("no choice of answers reaches all thresholds")
