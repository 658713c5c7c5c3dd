"""The world of `heterogeneous_noise.py`: answers, pairs, and label noise by cause."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, softmax

from jaxpref.data.noise import margin_rates, margin_temperature

ANSWERS, FEATURES = 2000, 80
KL = 0.64
"""The KL at which all policies are compared, nats."""


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Answers to one prompt, all equally likely under the reference."""

    features: np.ndarray
    """[ANSWERS, FEATURES]"""
    reward: np.ndarray
    log_length: np.ndarray
    """Independent of the reward."""


def make_world(seed: int) -> World:
    """Normal features; reward and length are two orthogonal directions of them."""
    rng = np.random.default_rng((seed, 0))
    features = rng.normal(size=(ANSWERS, FEATURES))
    directions, _ = np.linalg.qr(rng.normal(size=(FEATURES, 2)))
    reward, length = (features @ directions).T
    return World(features, reward, 0.5 * length)


@dataclasses.dataclass(frozen=True)
class Unlabeled:
    """N pairs before they are labeled; all arrays are [N]."""

    margin: np.ndarray
    """Reward of the first answer minus that of the second."""
    ratio: np.ndarray
    """The same for the logarithm of the length."""
    first_shown: np.ndarray
    """bool; whether the annotator sees the first answer first."""
    on_topic: np.ndarray
    """bool; a quarter of the pairs."""
    lot: np.ndarray
    """Uniform on [0, 1): decides who labels the pair."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Who labels each pair, and the probability that the label is wrong; [N]."""

    annotator: np.ndarray
    """0 or 1, known to the methods."""
    if_first: np.ndarray
    """The flip rate if the first answer is the better one."""
    if_second: np.ndarray
    """The flip rate if the second one is."""


def no_noise(pairs: Unlabeled) -> Noise:
    """Every label is right."""
    return _alike(pairs, 0.0, 0.0)


def symmetric(pairs: Unlabeled) -> Noise:
    """All labels have a flip rate of 25%."""
    return _alike(pairs, 0.25, 0.25)


def two_annotators(pairs: Unlabeled) -> Noise:
    """Half of the labels each, with flip rates of 5% and 40%."""
    second = pairs.lot >= 0.5
    rate = np.where(second, 0.4, 0.05)
    return Noise(second.astype(int), rate, rate)


def adversary(pairs: Unlabeled) -> Noise:
    """30% of the labels have a flip rate of 80%, the others are right."""
    second = pairs.lot >= 0.7
    rate = np.where(second, 0.8, 0.0)
    return Noise(second.astype(int), rate, rate)


def half_by_length(pairs: Unlabeled) -> Noise:
    """One of two annotators names the longer answer, right or wrong."""
    second, longer = pairs.lot >= 0.5, pairs.ratio > 0
    rates = (np.where(second, wrong, 0.0) for wrong in (~longer, longer))
    return Noise(second.astype(int), *rates)


def by_class(pairs: Unlabeled) -> Noise:
    """The flip rate is 40% where the shorter answer is better, and otherwise 5%."""
    shorter = pairs.ratio < 0
    return _alike(pairs, *(np.where(wrong, 0.4, 0.05) for wrong in (shorter, ~shorter)))


def on_a_topic(pairs: Unlabeled) -> Noise:
    """On a quarter of the pairs, the flip rate is 80%, whoever labels them."""
    rate = np.where(pairs.on_topic, 0.8, 0.0)
    return _alike(pairs, rate, rate)


def half_by_position(pairs: Unlabeled) -> Noise:
    """Half of the labels name the answer that was shown first."""
    first = pairs.first_shown
    return _alike(pairs, *(np.where(wrong, 0.5, 0.0) for wrong in (~first, first)))


def hard_pairs(pairs: Unlabeled) -> Noise:
    """Small reward differences are flipped more, 25% of all labels."""
    rate = margin_rates(pairs.margin, margin_temperature(pairs.margin, rate=0.25))
    return _alike(pairs, rate, rate)


def _alike(pairs: Unlabeled, if_first, if_second) -> Noise:
    """Two annotators who label half of the pairs each, in the same way."""
    rates = (np.broadcast_to(x, pairs.lot.shape) for x in (if_first, if_second))
    return Noise((pairs.lot >= 0.5).astype(int), *rates)


NOISES: Mapping[str, Callable[[Unlabeled], Noise]] = {
    "symmetric": symmetric,
    "hard pairs": hard_pairs,
    "two annotators": two_annotators,
    "adversary": adversary,
    "topic": on_a_topic,
    "half by position": half_by_position,
    "by class": by_class,
    "half by length": half_by_length,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Labeled pairs; all differences are of the labeled answer minus the other one."""

    features: np.ndarray
    """[N, FEATURES]"""
    length: np.ndarray
    """tanh(2 log(length ratio)), as `instance_noise` computes it; [N]."""
    position: np.ndarray
    """1 if the labeled answer was shown first, else -1; [N]."""
    topic: np.ndarray
    """1 if the pair is on the topic, else 0; [N]."""
    annotator: np.ndarray
    """0 or 1; [N]."""
    rate: np.ndarray
    """e, the true flip rate if the labeled answer is the better one; [N]."""
    other_rate: np.ndarray
    """e', the true flip rate if the other answer is the better one; [N]."""


def draw_pairs(
    world: World, count: int, noise: Callable[[Unlabeled], Noise], seed: int
) -> Pairs:
    """Random pairs with Bradley-Terry labels, then noise; one seed, the same pairs."""
    rng = np.random.default_rng((seed, 1))
    first, second = rng.integers(0, ANSWERS, (2, count))
    margin = world.reward[first] - world.reward[second]
    right = rng.random(count) < expit(margin)
    lot, v = rng.random((2, count))
    topic, place = rng.random((2, count))
    ratio = world.log_length[first] - world.log_length[second]
    # An answer may meet itself: no noise depends on the sign of such a margin of 0.
    nonzero = np.where(margin == 0, 1e-9, margin)
    found = noise(Unlabeled(nonzero, ratio, place < 0.5, topic < 0.25, lot))
    label = np.where(right, v >= found.if_first, v < found.if_second)
    chosen, rejected = np.where(label, first, second), np.where(label, second, first)
    sign = np.where(label, 1, -1)
    return Pairs(
        features=world.features[chosen] - world.features[rejected],
        length=np.tanh(2 * sign * ratio),
        position=sign * np.where(place < 0.5, 1.0, -1.0),
        topic=(topic < 0.25).astype(float),
        annotator=found.annotator,
        rate=np.where(label, found.if_first, found.if_second),
        other_rate=np.where(label, found.if_second, found.if_first),
    )


def at_matched_kl(score: np.ndarray, reward: np.ndarray) -> float:
    """The expected reward of exp(c score), with c such that the KL is `KL`."""
    score = score - score.max()

    def policy(c):
        weights = softmax(c * score)
        return weights, weights @ np.log(np.maximum(weights * ANSWERS, 1e-300))

    high = 100.0 / max(score.std(), 1e-9)
    scale = brentq(lambda c: policy(c)[1] - KL, 0.0, high, xtol=1e-9 * high)
    return float(policy(scale)[0] @ reward)
