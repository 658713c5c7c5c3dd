"""Reward against KL: comparisons at matched KL, and with the best possible reward.

A policy can gain reward by moving away from its reference, so a reward alone does not
compare two methods: the one with the smaller beta usually wins.  These functions
compare sweeps of a method over beta (or over the steps of a run) at the same KL, and
with the best possible reward at that KL where it is known.

Between measured points, frontiers are piecewise linear in sqrt(KL), because the gain of
a small tilt is linear in it: a policy proportional to ref exp(t r) gains t Var(r) at a
KL of t^2 Var(r) / 2.  (Gao et al. 2022, arXiv:2210.10760, also plot reward over
sqrt(KL).)  Points are not replaced by their upper envelope, which would select lucky
measurements.  Outside the measured range the result is NaN: nothing is extrapolated.

Pure numpy functions in float64 for the host.
"""

import math

import numpy as np
from jaxtyping import Float


def best_possible(
    rewards: Float[np.ndarray, "prompts samples"],
    tilts: Float[np.ndarray, " points"],
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """The exact frontier: the highest reward at a KL, from samples of the reference.

        pi_t(y|x) = ref(y|x) exp(t r(x, y)) / Z_t(x)
        reward = mean_x E_{pi_t} r,    KL = mean_x E_{pi_t} [t r - log Z_t(x)]

    No policy has a higher mean reward at its mean KL.  Expectations under pi_t are
    importance-weighted means over the samples.  DPO on unlimited clean labels, drawn
    with P(a beats b) = s(c (r_a - r_b)), converges to t = c / beta (Rafailov et al.
    2023, equation 4).

    Args:
      rewards: true rewards of samples from the reference at temperature 1.
      tilts: t, inverse temperatures >= 0; 0 is the reference itself.

    Returns:
      (KLs in nats, rewards), each [points].  NaN where the weights of some prompt are
      worth fewer than 30 samples (Kish's effective sample size, 1 / sum w^2), since the
      KL would then be too low.

    Raises:
      ValueError: if shapes are wrong, a reward is not finite, or a tilt is negative.

    References:
      Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, Eq. 4.
    """
    rewards, tilts = _finite("rewards", rewards, 2), _finite("tilts", tilts, 1)
    if (tilts < 0).any():
        raise ValueError(f"Expected tilts >= 0, got {tilts.min()}.")
    kls, means = np.empty_like(tilts), np.empty_like(tilts)
    for n, tilt in enumerate(tilts):
        logits = tilt * (rewards - rewards.max(axis=1, keepdims=True))
        normalizer = np.mean(np.exp(logits), axis=1, keepdims=True)
        weights = np.exp(logits) / normalizer / rewards.shape[1]
        kl = np.sum(weights * (logits - np.log(normalizer)), axis=1)
        enough = np.all(np.sum(weights**2, axis=1) <= 1 / _FEWEST_SAMPLES)
        # The reference itself has KL 0 up to rounding.
        kls[n] = max(np.mean(kl), 0.0) if enough else math.nan
        means[n] = np.mean(np.sum(weights * rewards, axis=1)) if enough else math.nan
    return kls, means


_FEWEST_SAMPLES = 30


def reward_at_kl(
    kls: Float[np.ndarray, " points"],
    rewards: Float[np.ndarray, " points"],
    at: Float[np.ndarray, " targets"],
) -> Float[np.ndarray, " targets"]:
    """The reward of a sweep at given KLs, piecewise linear in sqrt(KL).

    Args:
      kls: KL to the reference of each run of the sweep, in nats, >= 0; in any order.
        Points with equal KL are averaged.
      rewards: reward of each run.
      at: KLs at which to compare, >= 0.

    Returns:
      One reward per target; NaN outside the range of `kls`.  Include the reference (KL
      0 and its reward) as a point if the range should start there.

    Raises:
      ValueError: if shapes differ, there is no point, a value is not finite, or a KL is
        negative.
    """
    kls, rewards = _sweep(kls, rewards)
    at = _finite("at", at, 1)
    if (at < 0).any():
        raise ValueError(f"Expected KLs >= 0, got {at.min()}.")
    roots, same = np.unique(np.sqrt(kls), return_inverse=True)
    means = np.bincount(same, rewards) / np.bincount(same)
    return np.interp(np.sqrt(at), roots, means, left=math.nan, right=math.nan)


def share_of_best_possible(
    kls: Float[np.ndarray, " runs"],
    rewards: Float[np.ndarray, " runs"],
    best_kls: Float[np.ndarray, " points"],
    best_rewards: Float[np.ndarray, " points"],
) -> Float[np.ndarray, " runs"]:
    """Gain of each run, divided by the largest possible gain at the run's own KL.

        share = (reward - start) / (best(KL) - start)

    `start` is the reward of the reference, best at KL 0.

    Args:
      kls: KL to the reference of each run, in nats, >= 0.
      rewards: reward of each run.
      best_kls: KLs of the best possible curve (`best_possible`); 0 must be one.  NaN
        points are left out.
      best_rewards: its rewards.

    Returns:
      One share per run; 1 is the best possible.  NaN at KL 0 and beyond the curve.

    Raises:
      ValueError: if shapes differ, a value is not finite, a KL is negative, or the
        curve does not begin at KL 0.
    """
    kls, rewards = _sweep(kls, rewards)
    best_kls, best_rewards = np.asarray(best_kls), np.asarray(best_rewards)
    known = ~np.isnan(best_kls)
    best_kls, best_rewards = _sweep(best_kls[known], best_rewards[known])
    if best_kls.min() != 0:
        raise ValueError(
            f"Expected a curve from KL 0, the reference, got {best_kls.min()}."
        )
    start = best_rewards[best_kls == 0].mean()
    best = reward_at_kl(best_kls, best_rewards, kls) - start
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(kls > 0, (rewards - start) / best, math.nan)


def t_interval(
    values: Float[np.ndarray, " draws"], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean over draws of the noise, and Student's t interval.

        mean -+ t_{n-1} sd / sqrt(n)

    For a comparison of two methods on the same draws, give the differences: the
    interval is then paired.  With as few as five draws, a percentile bootstrap is too
    narrow (it covers about 80% instead of 95%); this interval is exact if the values
    are normal.

    Args:
      values: one value per draw (seed of the flips).
      confidence: probability of covering the true mean, in (0, 1).

    Returns:
      (mean, lower, upper).  All are NaN if a value is NaN: a draw outside its measured
      range is not left out, because it is not missing at random.  The ends are NaN if
      there is only one draw.

    Raises:
      ValueError: if there is no draw, or `confidence` is not in (0, 1).

    References:
      Student, "The Probable Error of a Mean", 1908.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"Expected one value per draw, got shape {values.shape}.")
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence in (0, 1), got {confidence}.")
    mean = float(np.mean(values))
    if len(values) < 2 or math.isnan(mean):
        return mean, math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = _t_quantile(0.5 + 0.5 * confidence, len(values) - 1) * error
    return mean, mean - half, mean + half


def choose_setting(
    kls: Float[np.ndarray, "draws settings"],
    rewards: Float[np.ndarray, "draws settings"],
    *,
    most_kl: float,
) -> int:
    """The tuning rule, the same for every loss: most reward within a KL budget.

    Of the settings (betas, say) whose mean KL is at most the budget, it chooses the one
    with the highest mean reward.  The draws given here are for tuning only: report the
    chosen setting on other draws.

    Args:
      kls: KL to the reference of each run, in nats.
      rewards: reward of each run.
      most_kl: the budget, in nats, e.g. the KL of the run on clean labels.

    Returns:
      Index of the setting; of two with equal reward, the one with the smaller KL.

    Raises:
      ValueError: if shapes differ, a value is not finite, or no setting is within the
        budget.
    """
    kls, rewards = _finite("kls", kls, 2), _finite("rewards", rewards, 2)
    if kls.shape != rewards.shape:
        raise ValueError(f"Expected equal shapes, got {kls.shape}, {rewards.shape}.")
    kl, reward = kls.mean(axis=0), rewards.mean(axis=0)
    within = np.flatnonzero(kl <= most_kl)
    if not within.size:
        raise ValueError(
            f"No setting has a mean KL of at most {most_kl} (the smallest is "
            f"{kl.min():.3g}); add settings that stay closer to the reference."
        )
    return int(min(within, key=lambda n: (-reward[n], kl[n])))


def _finite(name: str, values, axes: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != axes or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"Expected finite {name} with {axes} axes, at least one, got shape "
            f"{values.shape} with {np.sum(~np.isfinite(values))} not finite."
        )
    return values


def _sweep(kls, rewards) -> tuple[np.ndarray, np.ndarray]:
    kls, rewards = _finite("kls", kls, 1), _finite("rewards", rewards, 1)
    if kls.shape != rewards.shape:
        raise ValueError(f"Expected equal shapes, got {kls.shape}, {rewards.shape}.")
    if (kls < 0).any():
        raise ValueError(f"Expected KLs >= 0, got {kls.min()}.")
    return kls, rewards


def _t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t at a probability >= 1/2, by bisection."""
    low, high = 0.0, 1.0
    while _t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = _t_probability(middle, degrees) < probability
        low, high = (middle, high) if below else (low, middle)
    return 0.5 * (low + high)


def _t_probability(t: float, degrees: int) -> float:
    """P(T <= t) for integer degrees of freedom (Abramowitz and Stegun 26.7.3, 4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
    else:
        inside = sine * total
    return 0.5 + 0.5 * inside
