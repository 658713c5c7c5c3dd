"""The records of `record_kinds.py`: pairs, thumbs, and lists of the same answers.

Their information is measured by the Cramer-Rao bound: with n records whose Fisher
information about theta is J each, no unbiased estimate of the rewards theta . f has a
smaller error (the variance of an answer's reward, less the mean over its prompt's
answers, averaged over answers and prompts) than

    bound / n,    bound = tr(C J^-1),    C = mean over prompts of Cov(f)

so kinds of records are equally informative if `bound / n` is the same.
"""

import dataclasses

import numpy as np

from experiments.leaderboard_world import World
from experiments.sentiment_world import SHARPNESS
from jaxpref.data.noise import flip_symmetric

FLIP_RATE = 0.4
SIZE = 4
"""Answers of a list."""

Records = dict[str, np.ndarray]
"""`answers` [N, K], and the numbers of the records by the names of `data.columns`."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """s(x) = 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def draw_groups(world: World, count: int, *, seed: int) -> np.ndarray:
    """Groups of `SIZE` different answers to one prompt, uniform: [count, SIZE]."""
    rng = np.random.default_rng(seed)
    prompts, reviews = world.rewards.shape
    prompt = rng.integers(prompts, size=(count, 1))
    return prompt * reviews + rng.random((count, reviews)).argpartition(SIZE)[:, :SIZE]


# ---- records -------------------------------------------------------------------------


def make_pairs(world: World, groups: np.ndarray, *, seed: int) -> Records:
    """Two pairs of each group: Bradley-Terry labels, then flips."""
    answers = groups.reshape(-1, 2)
    rewards = world.rewards.ravel()[answers]
    first = _labels(rewards[:, 0] - rewards[:, 1], seed=seed)
    return {"answers": np.where(first[:, None], answers, answers[:, ::-1])}


def make_thumbs(world: World, groups: np.ndarray, *, seed: int) -> Records:
    """Single answers: P(up) = s(2 (r - mean reward)), then flips.

    The second answer is one to another prompt, for the reference point of KTO.
    """
    answers, reviews = groups.ravel(), world.rewards.shape[1]
    up = _labels(world.rewards.ravel()[answers] - world.rewards.mean(), seed=seed)
    rng = np.random.default_rng((seed, 1))
    other = rng.permutation(answers)
    while (same := answers // reviews == other // reviews).any():
        other[same] = rng.choice(answers, same.sum())
    return {"answers": np.stack([answers, other], 1), "desirable": up.astype(float)}


def make_lists(
    world: World, groups: np.ndarray, *, sharpness: float, seed: int
) -> Records:
    """Each group ranked by noisy ratings, sharpness * r + Gumbel noise, best first."""
    noise = np.random.default_rng((seed, 2)).gumbel(size=groups.shape)
    order = np.argsort(-sharpness * world.rewards.ravel()[groups] - noise, axis=1)
    same = lambda values: np.tile(np.array(values, float), (len(groups), 1))
    below = same(np.arange(SIZE)[::-1] / (SIZE - 1))
    return {
        "answers": np.take_along_axis(groups, order, 1),
        "ranks": same(1 + np.arange(SIZE)),
        "qualities": below,
        "relevances": below,
    }


def all_pairs(lists: Records) -> Records:
    """Every pair of each list, the better one first."""
    better, worse = np.triu_indices(SIZE, 1)
    ranked = lists["answers"]
    return {
        "answers": np.stack([ranked[:, better], ranked[:, worse]], 2).reshape(-1, 2)
    }


def _labels(advantages: np.ndarray, *, seed: int) -> np.ndarray:
    """True with P = s(2 advantage), then flipped at `FLIP_RATE`."""
    draws = np.random.default_rng((seed, 3)).random(len(advantages))
    ids = [f"label {n}" for n in range(len(advantages))]
    flips = flip_symmetric(ids, rate=FLIP_RATE, seed=seed)
    return (draws < sigmoid(SHARPNESS * advantages)) ^ flips


# ---- the information of a record -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bounds:
    """`bound` of each kind of record, and the noise of lists that follows from them."""

    pair: float
    thumb: float
    list: float
    sharpness: float
    """v: ratings are v r + Gumbel noise."""

    @property
    def thumbs_per_pair(self) -> float:
        """How many thumbs have the information of a pair."""
        return self.thumb / self.pair


def measure_bounds(world: World, *, groups: int = 20_000) -> Bounds:
    """The bounds of pairs and thumbs, and of lists with the information of two pairs.

    Args:
      world: the world.
      groups: by how many groups the information of pairs and lists is estimated.
    """
    centered = _centered(world)
    drawn = draw_groups(world, groups, seed=0)
    pair = _bound(centered, of_pairs(world, drawn.reshape(-1, 2)))
    thumb = _bound(centered, of_thumbs(world))
    lists = lambda sharpness: _bound(centered, of_lists(world, drawn, sharpness))
    low, high = 0.0, SHARPNESS
    for _ in range(12):
        middle = (low + high) / 2
        is_enough = lists(middle) < pair / 2
        low, high = (low, middle) if is_enough else (middle, high)
    return Bounds(pair, thumb, lists(high), high)


def label_information(logits: np.ndarray) -> np.ndarray:
    """Fisher information of a label with P = s(x), then flipped, about x.

    I = ((1 - 2 e) p (1 - p))^2 / (q (1 - q)),    p = s(x),    q = e + (1 - 2 e) p
    """
    p = sigmoid(logits)
    q = FLIP_RATE + (1 - 2 * FLIP_RATE) * p
    return ((1 - 2 * FLIP_RATE) * p * (1 - p)) ** 2 / (q * (1 - q))


def of_pairs(world: World, answers: np.ndarray) -> np.ndarray:
    """Mean information of the label of a pair about theta, [features, features]."""
    first, second = (world.features[side] for side in answers.T)
    rewards = world.rewards.ravel()[answers]
    weights = label_information(SHARPNESS * (rewards[:, 0] - rewards[:, 1]))
    return _outer(SHARPNESS * (first - second), weights)


def of_thumbs(world: World) -> np.ndarray:
    """Mean information of a thumb about theta.

    The threshold is unknown: it is the direction of theta in which all rewards change
    by the same number, since the features of the clauses of a review sum to 1.
    """
    advantages = world.rewards.ravel() - world.rewards.mean()
    weights = label_information(SHARPNESS * advantages)
    return _outer(SHARPNESS * world.features, weights)


def of_lists(world: World, groups: np.ndarray, sharpness: float) -> np.ndarray:
    """Mean information of a ranking about theta, with expectations over rankings.

    By the Plackett-Luce model, a ranking is a chain of choices of the best answer that
    is left.  A choice with probabilities p has v^2 Cov_p(f).
    """
    ranked = make_lists(world, groups, sharpness=sharpness, seed=0)["answers"]
    total = np.zeros((world.features.shape[1],) * 2)
    for first in range(SIZE - 1):
        left = ranked[:, first:]
        p = np.exp(sharpness * world.rewards.ravel()[left])
        p /= p.sum(axis=1, keepdims=True)
        f = sharpness * world.features[left]
        f = f - (p[..., None] * f).sum(axis=1, keepdims=True)
        total += left.shape[1] * _outer(f.reshape(-1, f.shape[-1]), p.ravel())
    return total


def _outer(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (rows * weights[:, None]).T @ rows / len(rows)


def _centered(world: World) -> np.ndarray:
    """C, the covariance of the features within a prompt."""
    features = world.features.reshape(*world.rewards.shape, -1)
    features = features - features.mean(axis=1, keepdims=True)
    features = features.reshape(len(world.features), -1)
    return _outer(features, np.ones(len(features)))


def _bound(centered: np.ndarray, information: np.ndarray) -> float:
    """tr(C J^-1); differences of answers do not depend on what they have in common."""
    inverse = np.linalg.pinv(information, rcond=1e-9, hermitian=True)
    return float(np.trace(centered @ inverse))
