"""ABOUT"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import strengths, ukp
from experiments.annotators_report import write_results
from experiments.strengths import Strengths
from experiments.ukp import World
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.noise import em
from jaxpref.train.entry import entry_point

ENOUGH = 30
"""Votes of a worker whose agreement with gold is worth a rank."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that decides the result; chosen on the questions held back."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dimensions: int = 200
    plain_scale: float = 0.03
    """Prior variance of the text weights of models of text alone."""
    scale: float = 0.1
    """The same of the joint model."""
    spread: float = 0.3
    """Prior variance of what is an argument's own, in the joint model."""
    smoothing: float = 0.1
    prior: tuple[float, float] = (9.0, 1.0)
    """Right and wrong votes that every worker is given."""
    trust: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What the model's margin counts in the E-step: with one vote, two, all."""
    rounds: int = 10
    """Of the joint model: strengths, then reliabilities."""
    folds: int = 5


REGIMES = {"one vote a pair": 1, "two votes a pair": 2, "all votes": 5}


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes that a run sees, V' of them on P' pairs."""

    at: tuple[np.ndarray, np.ndarray, np.ndarray]
    """(topic, first, second) of each pair, int [P']."""
    pair: np.ndarray
    """int [P']; index of the pair in the world."""
    item: np.ndarray
    """int [V']; index in `pair` of each vote's pair."""
    worker: np.ndarray
    """int [V']."""
    sign: np.ndarray
    """int [V']; 1 for the first, -1 for the second."""

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums over the votes of each pair."""
        return np.bincount(self.item, values, len(self.pair))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How much of the experiment to run."""

    out: str | None = None
    """Folder for results; without it runs/annotators, with _smoke behind."""
    data: str = "../shared/data/ukpconvarg1_votes.jsonl.gz"
    """UKPConvArg1 with single votes."""
    smoke: bool = False
    """Only see that it works: one seed, few directions, numbers that mean little."""


def see(world: World, votes: int, *, seed: int) -> Votes:
    """A draw of the votes, at most so many a pair."""
    seen = ukp.draw(world, votes, seed=seed)
    pair, item = np.unique(world.pairs[seen], return_inverse=True)
    at = world.topics[pair], world.first[pair], world.second[pair]
    return Votes(at, pair, item, world.workers[seen], world.signs[seen])


# ---- methods: what they make of the votes they see ---------------------------------


def learn_from(seen: Votes, features, soft, weights, protocol: Protocol, *, topics):
    """Margins of all pairs under models of text that never saw their topic; [P']."""

    def model(trains):
        return strengths.fit(
            features * np.sqrt(protocol.plain_scale),
            seen.at,
            soft,
            weights * trains,
            spread=strengths.ALONE,
            start=strengths.zeros(features),
        )

    return crossed(
        lambda trains: model(trains).w * np.sqrt(protocol.plain_scale),
        features,
        seen.at,
        topics=topics,
        folds=protocol.folds,
    )


def crossed(train, features, at, *, topics, folds: int) -> np.ndarray:
    """Each fold of topics under `train(pairs outside it)`, which gives weights [D]."""
    margin = np.zeros(len(at[0]))
    for fold in range(folds):
        held = at[0] % folds == fold
        w = train(~held)
        text = Strengths(w, np.zeros(features.shape[:2]))
        margin[held] = strengths.margins(text, features, at)[held]
    return margin


def reliabilities(seen: Votes, margin, num_workers: int, prior, where=None) -> em.Fit:
    """EM over the votes; with margins of 0 it is Dawid and Skene's, without text."""
    return em.fit(
        (margin[seen.item] * seen.sign).astype(np.float32),
        seen.worker,
        items=seen.item,
        orientation=seen.sign,
        num_annotators=num_workers,
        prior=prior,
        where=where,
        tolerance=1e-4,
    )


def pair_logits(seen: Votes, fit: em.Fit, where=None) -> np.ndarray:
    """Logit of "the first is better" given all votes of the pair; [P']."""
    eta = np.asarray(fit.reliability, np.float64)[seen.worker]
    logit = np.asarray(fit.evidence, np.float64) + np.log(eta / (1 - eta))
    where = np.ones(len(logit), bool) if where is None else where
    values = np.zeros(len(seen.pair))
    values[seen.item[where]] = (logit * seen.sign)[where]
    return values


def learn_jointly(
    seen: Votes, features, num_workers: int, protocol: Protocol, trust, trains=None
) -> tuple[Strengths, em.Fit, np.ndarray]:
    """Strengths and reliabilities from each other, in turns.

    What a pair's margin is to the E-step comes from all votes but its own: the pair's
    own evidence is taken out of the posterior (the cavity of Laplace's approximation),
    and what is uncertain about the margin makes it smaller.

    Args:
      trains: which pairs are used, bool [P']; None for all.

    Returns:
      Strengths (for `features` times the root of the scale), reliabilities, and the
      margins of the last E-step [P'].
    """
    trains = np.ones(len(seen.pair), bool) if trains is None else trains
    where = trains[seen.item]
    features = features * np.sqrt(protocol.scale)
    a, b = protocol.prior
    evidence = seen.total(seen.sign * where) * np.log(a / b)
    x, believed = strengths.zeros(features), evidence
    for turn in range(protocol.rounds):
        soft = 1 / (1 + np.exp(-believed))
        x = strengths.fit(
            features,
            seen.at,
            soft,
            trains.astype(float),
            spread=protocol.spread,
            start=x,
            max_iterations=25 if turn == 0 else 3,
        )
        margin = strengths.margins(x, features, seen.at)
        outside = trust * cavity(
            features, seen.at, margin, evidence, trains, spread=protocol.spread
        )
        fit = reliabilities(seen, outside, num_workers, protocol.prior, where)
        evidence = np.where(trains, pair_logits(seen, fit, where) - outside, 0)
        believed = trust * margin + evidence
    return x, fit, outside


def cavity(features, at, margin, evidence, trains, *, spread: float) -> np.ndarray:
    """Margins without the pair's own votes, shrunk by their uncertainty.

        log-likelihood of the votes of a pair    log [s(m) s(v) + s(-m) s(-v)] + const
        gradient g = s(m + v) - s(m),   precision h = s'(m) - s'(m + v)
        variance without it V' = V / (1 - h V),   margin without it m' = m - V' g

    v is what the votes say (their logit), V the margin's posterior variance.  The
    result is m' / sqrt(1 + pi V' / 8), whose s is about E s(m').
    """
    s = lambda x: 1 / (1 + np.exp(-x))
    p, r = s(margin), s(margin + evidence)
    precision = np.maximum(p * (1 - p) - r * (1 - r), 1e-3) * trains
    variance = strengths.variances(features, at, precision, spread=spread)
    without = variance / np.maximum(1 - precision * variance, 0.1)
    shifted = margin - without * (r - p) * trains
    return shifted / np.sqrt(1 + np.pi * without / 8)


# ---- what is measured ---------------------------------------------------------------


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; nan where all of `a` or `b` are equal."""
    a, b = ranks(a), ranks(b)
    if not (np.ptp(a) and np.ptp(b)):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, the mean of theirs for equal values."""
    _, place, count = np.unique(np.round(x, 7), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: P(a positive scores higher), ties half."""
    rank, n = ranks(scores), int(positive.sum())
    return float((rank[positive].sum() - n * (n - 1) / 2) / (n * (len(rank) - n)))
