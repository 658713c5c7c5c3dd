"""Finding wrong crowd votes and unreliable workers from single votes and the text.

Claim
    RE-PO (Cao et al. 2025, arXiv:2509.24159) learns the reliability of each annotator
    from a model of the text.  With one vote per pair, text-free aggregation (Dawid and
    Skene 1979) is uninformative, but reliabilities learned jointly with argument
    strengths identify wrong votes.  With two votes per pair they are better than
    aggregation, and with all votes only slightly worse.  They do not improve a model of
    unseen topics.

Commands
    python -m benchmarks.inputs ukp               (the data, once)
    python -m experiments.annotators              (default)
    python -m experiments.annotators --smoke      (sanity check on made-up votes)

Expected
    Default, mean and standard deviation over five draws of the votes (all: one draw):

        one vote per pair     accuracy       AUROC          Spearman     without
        length alone          0.747 ± 0.000  0.767 ± 0.003  –            –
        plain BT              0.772 ± 0.001  0.796 ± 0.004  –            –
        label smoothing       0.773 ± 0.001  0.796 ± 0.004  –            –
        majority vote         0.772 ± 0.001  0.500 ± 0.000  –            –
        Dawid-Skene, no text  0.773 ± 0.001  0.500 ± 0.000  –            –
        EM, text margins      0.775 ± 0.001  0.767 ± 0.003  0.26 ± 0.05  0.29 ± 0.07
        CRM                   0.770 ± 0.001  0.793 ± 0.004  –            –
        EM, jointly           0.773 ± 0.001  0.880 ± 0.007  0.38 ± 0.04  0.38 ± 0.06
        oracle                0.774 ± 0.000  –              0.65 ± 0.04  0.55 ± 0.06

        two votes per pair    accuracy       AUROC          Spearman     without
        length alone          0.747 ± 0.000  0.768 ± 0.001  –            –
        plain BT              0.775 ± 0.001  0.798 ± 0.001  –            –
        label smoothing       0.776 ± 0.001  0.799 ± 0.001  –            –
        majority vote         0.772 ± 0.002  0.844 ± 0.004  –            –
        Dawid-Skene, no text  0.773 ± 0.001  0.863 ± 0.004  0.45 ± 0.05  0.41 ± 0.05
        EM, text margins      0.776 ± 0.001  0.907 ± 0.003  0.50 ± 0.05  0.48 ± 0.05
        CRM                   0.768 ± 0.001  0.788 ± 0.001  –            –
        EM, jointly           0.772 ± 0.001  0.934 ± 0.002  0.55 ± 0.04  0.53 ± 0.04
        oracle                0.774 ± 0.000  –              0.83 ± 0.02  0.71 ± 0.03

        all votes             accuracy       AUROC          Spearman     without
        length alone          0.747          0.773          –            –
        plain BT              0.774          0.806          –            –
        label smoothing       0.774          0.807          –            –
        majority vote         0.773          0.985          –            –
        Dawid-Skene, no text  0.773          0.990          0.87         0.82
        EM, text margins      0.776          0.987          0.83         0.81
        CRM                   0.767          0.795          –            –
        EM, jointly           0.773          0.990          0.86         0.82
        oracle                0.774          –              1.00         0.86

    Crowd-BT and the audit's estimates were added later, and measured without accuracy;
    the audit with two votes per pair only on draws 0, 1, and 3:

        one vote per pair      AUROC          Spearman
        Crowd-BT, no text      0.882 ± 0.006  0.35 ± 0.03
        Crowd-BT, text         0.883 ± 0.005  0.37 ± 0.04
        Crowd-BT, text, share  0.883 ± 0.005  0.38 ± 0.04
        audit, text margins    0.730 ± 0.005  0.24 ± 0.03
        audit, strengths       0.877 ± 0.006  0.35 ± 0.04

        two votes per pair     AUROC          Spearman     without
        Crowd-BT, no text      0.906 ± 0.001  0.49 ± 0.03  0.47 ± 0.05
        Crowd-BT, text         0.933 ± 0.001  0.55 ± 0.04  0.53 ± 0.03
        Crowd-BT, text, share  0.933 ± 0.001  0.53 ± 0.05  0.49 ± 0.04
        audit, text margins    0.898 ± 0.001  0.45 ± 0.01  0.45 ± 0.01
        audit, strengths       0.934 ± 0.001  0.54 ± 0.05  0.53 ± 0.04

        all votes              AUROC          Spearman     without
        Crowd-BT, no text      0.921          0.62         0.58
        Crowd-BT, text         0.990          0.87         0.82
        Crowd-BT, text, share  0.990          0.70         0.67
        audit, text margins    0.977          0.78         0.75
        audit, strengths       0.973          0.76         0.75

    accuracy: agreement with gold of a text model trained on no pair of the topic.
    AUROC: of finding votes that contradict gold.  Spearman: rank correlation of the
    learned reliability with the share of all of a worker's votes that agree with gold,
    for 155 workers with 30 or more votes; "without": with the agreement with the other
    workers' votes on the pair (Dawid-Skene from all other votes).  "oracle" uses gold:
    a text model trained on it, and the agreement of the seen votes with it.
    Time: 1.8 minutes on two cores busy with other work, with OPENBLAS_NUM_THREADS=1
    (jax 0.10.2, CPU); 17 seconds with --smoke.

Goals, and which were missed
    One vote per pair, text better than Crowd-BT without it: AUROC reached, 0.883 over
    0.882, higher in five draws of five.  Spearman missed: ranking by the share gains
    0.030 ± 0.024, positive in five draws of five (0.010, 0.025, 0.043, 0.066, 0.008),
    but not more than the spread of 0.03 to 0.04; ranking by the reliability gains
    0.015 ± 0.024.  On the development questions, where workers have fewer votes, the
    share gained 0.12.  With about 23 votes per worker, even gold for the seen votes
    gives only 0.65.
    One vote per pair, Spearman 0.40: 0.38 ± 0.04, missed by 0.02 (one draw of five is
    above).  AUROC 0.85: 0.88, reached.  Two points of accuracy over BT and smoothing:
    0.1 and 0.0, missed (CRM: 0.2 below BT).  The same text model trained on gold is no
    better, so label noise does not limit the accuracy on unseen topics with these
    features.  With two votes, the joint EM is 0.3 below BT.
    All votes, not below Dawid-Skene: reached by Crowd-BT with the text, but by less
    than any spread: AUROC 0.9902 and 0.9902, Spearman 0.869 and 0.868 (without the
    worker 0.822 and 0.819).  The joint EM narrowly misses it: 0.9898 and 0.862 (0.820).
    Two votes, better than Dawid-Skene: reached, AUROC 0.93 over 0.86, Spearman 0.55
    over 0.45 (joint EM and Crowd-BT with the text).  Crowd-BT gains from the text here:
    AUROC 0.027 ± 0.002 and Spearman 0.052 ± 0.032, higher in five draws of five.
    The audit's estimates gain 0.147 in AUROC and 0.12 in Spearman from the strengths
    with one vote per pair, and 0.037 and 0.09 with two, in every draw.  With all votes,
    they lose 0.004 and 0.015: gold was estimated from these same votes without the
    text, and the audit has no weight for this, unlike the two other methods.

Protocol
    Votes: UKPConvArg1 (`ukp.py`), 49,498 votes; 15,038 ties (23%) are left out.
    Text: 200 principal components of surface statistics and of word and character
    TF-IDF.
    "plain BT", "label smoothing" (0.1), "majority vote", and the EMs train the same
    logistic Bradley-Terry model on different labels: votes, smoothed votes, majorities,
    posteriors.  There are five folds by topic; the other stance of a question may be in
    the training set.
    "Crowd-BT, no text" (Chen et al. 2013; `jaxpref.noise.crowd`): strengths and
    reliabilities from the votes alone.  "Crowd-BT, text": the prior mean of an argument
    is its score by a text model of other topics, trained on the strengths just
    mentioned; the margins without a pair's own votes then go to one more EM.  "share":
    workers are instead ranked by the expected share of their votes for the stronger
    argument, which depends on how hard their pairs were, as agreement with gold does.
    "audit": the estimates of `jaxpref audit` from the margins of plain BT, without and
    with Crowd-BT's strengths (`jaxpref.evaluate.recurring`); nothing in them was chosen
    on these votes.
    "CRM" (Zhang et al. 2025, arXiv:2505.10597): two such models, each trained on the
    pairs that the other one finds easy, without the share that "EM, text margins"
    considers wrong; the mean of both.
    "EM, text margins": the cross-fitted margins of plain BT are used in a single EM.
    "EM, jointly": a mixed model (`strengths.py`) gives every argument a strength from
    its text and an individual effect, so that votes on its other pairs inform a vote on
    this pair.  Strengths and reliabilities are refitted alternately, ten times.  The
    E-step uses a pair's margin without the pair's own votes, and averages over its
    uncertainty.  Prior of a worker: 9 votes right, 1 wrong.  For its accuracy, the
    reliabilities too are learned without the votes of the fold; the other two methods
    with reliabilities use all votes.
    The settings were chosen on the gold of three questions (six topics) that are not in
    these results, but whose votes are trained on.  So was the margin's weight with all
    votes, 0.25, because gold is MACE's estimate from these same votes without the text.
    The spread and the weights of Crowd-BT's margins were chosen on the same questions,
    with other draws.
    Changed after seeing results: the spread of the effects, from 3 to 30, again by the
    three questions (three draws had Spearman 0.35, 0.35, 0.43 with 3, and 0.35, 0.37,
    0.44 with 30); and the accuracy of the joint EM, which is now that of the common
    text model refitted to its posteriors (its own text part has 0.763).
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import crowds, strengths, ukp
from experiments.annotators_report import write_results
from experiments.progress import say
from experiments.ranks import area, rank_correlation
from experiments.strengths import Strengths
from experiments.ukp import World
from jaxpref.errors import InputError
from jaxpref.evaluate import votes as audit_votes
from jaxpref.evaluate.estimate import estimate
from jaxpref.evaluate.recurring import with_strengths
from jaxpref.files import write_json
from jaxpref.noise import em, peer
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked

ENOUGH = 30
"""Minimum number of votes for a worker to be ranked."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; chosen on the development questions."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dimensions: int = 200
    plain_scale: float = 0.03
    """Prior variance of the text weights in text-only models."""
    scale: float = 0.3
    """The same for the joint model."""
    spread: float = 30.0
    """Prior variance of an argument's individual effect in the joint model."""
    smoothing: float = 0.1
    prior: tuple[float, float] = (9.0, 1.0)
    """Right and wrong pseudo-votes of every worker."""
    trust: tuple[float, float, float] = (1.0, 1.0, 0.25)
    """Weight of the joint model's margin in the E-step with one, two, and all votes."""
    crowd_spread: float = 5.5
    """Standard deviation of the strengths around their prior mean in Crowd-BT."""
    crowd_trust: tuple[float, float, float] = (2.0, 1.0, 0.05)
    """Like `trust`, for the margins of Crowd-BT."""
    rounds: int = 10
    """Alternations between the joint model's strengths and reliabilities."""
    folds: int = 5
    reviews: int = 4
    """Rounds in which CRM's two models select each other's pairs; the share of dropped
    pairs grows over the first three."""


REGIMES = {"one vote per pair": 1, "two votes per pair": 2, "all votes": 5}


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
    """Options of the experiment."""

    out: str | None = None
    """Output folder (default: runs/annotators, with the suffix _smoke)."""
    data: str | None = None
    """UKPConvArg1 with single votes (default: what `benchmarks.inputs` makes; with
    --smoke, made-up votes)."""
    smoke: bool = False
    """A sanity check: one seed, few components, and meaningless numbers."""


def see(world: World, votes: int, *, seed: int) -> Votes:
    """A random sample of the votes, with a maximum number per pair."""
    seen = ukp.draw(world, votes, seed=seed)
    pair, item = np.unique(world.pairs[seen], return_inverse=True)
    at = world.topics[pair], world.first[pair], world.second[pair]
    return Votes(at, pair, item, world.workers[seen], world.signs[seen])


# ---- methods -----------------------------------------------------------------------


def learn_from(seen: Votes, features, soft, weights, protocol: Protocol) -> np.ndarray:
    """Margins of pairs under Bradley-Terry text models trained on other topics.

    `soft` [P'] are the labels of the pairs, as probabilities that the first is better,
    and `weights` [P'] the number of labels each stands for; features are [T, S, D].
    """
    return crossed(
        lambda trains: text_model(seen, features, soft, weights * trains, protocol),
        features,
        seen.at,
        folds=protocol.folds,
    )


def text_model(seen: Votes, features, soft, weights, protocol: Protocol) -> Strengths:
    """Logistic Bradley-Terry on the text alone; arguments as in `learn_from`."""
    scale = np.sqrt(protocol.plain_scale)
    x = strengths.fit(
        features * scale,
        seen.at,
        soft,
        weights,
        spread=strengths.ALONE,
        start=strengths.zeros(features),
    )
    return dataclasses.replace(x, w=x.w * scale)


def reviewed_model(
    seen: Votes, features, sign, trains, protocol: Protocol, *, noise_rate: float
) -> Strengths:
    """CRM: two text models, each trained on the pairs that the other one finds easy.

    Each starts with half of the pairs.  `sign` [P'] is the label, 0 for none.
    """
    labeled = trains & (sign != 0)
    lot = np.random.default_rng(0).random(len(sign)) < 0.5
    chosen = labeled & lot, labeled & ~lot
    for epoch in range(protocol.reviews + 1):
        both = [
            text_model(seen, features, (1 + sign) / 2, subset.astype(float), protocol)
            for subset in chosen
        ]
        margins = [sign * strengths.margins(x, features, seen.at) for x in both]
        keep = peer.kept_share(epoch + 1, noise_rate=noise_rate)
        chosen = peer.peer_selection(
            *(margin.astype(np.float32) for margin in margins),
            keep=keep,
            where=labeled,
        )
        chosen = [np.asarray(subset) for subset in chosen]
    one, two = both
    return dataclasses.replace(one, w=(one.w + two.w) / 2)


def crossed(train, features, at, *, folds: int) -> np.ndarray:
    """Text-only margins; each pair's model is trained on other topics."""
    return crowds.differences(crossed_scores(train, features, at, folds=folds), at)


def crossed_scores(train, features, at, *, folds: int) -> np.ndarray:
    """Text-only scores, [T, S]; each fold of topics uses `train(pairs outside it)`."""
    scores = np.zeros(features.shape[:2])
    for fold in range(folds):
        held = np.arange(len(features)) % folds == fold
        scores[held] = features[held] @ train(~held[at[0]]).w
    return scores


def reliabilities(seen: Votes, margin, num_workers: int, prior, where=None) -> em.Fit:
    """EM over the votes; with margins of 0, Dawid and Skene's method without text."""
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
    """Alternates between fitting strengths and reliabilities.

    The E-step uses a margin for each pair that does not depend on the pair's own votes:
    their evidence is removed from the posterior (the cavity of Laplace's
    approximation), and the margin is shrunk by its uncertainty.

    `trains`, bool [P'], selects the pairs to use; None means all.  Returns strengths
    (for `features` times the square root of the scale), reliabilities, and the margins
    of the last E-step [P'].
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
        outside = trust * strengths.cavity(
            features, seen.at, margin, evidence, trains, spread=protocol.spread
        )
        fit = reliabilities(seen, outside, num_workers, protocol.prior, where)
        evidence = np.where(trains, pair_logits(seen, fit, where) - outside, 0)
        believed = trust * margin + evidence
    return x, fit, outside


def crowd_arms(
    seen: Votes, features, num_workers: int, protocol: Protocol, regime: str
) -> dict[str, dict[str, np.ndarray]]:
    """Crowd-BT as published, and with the text: {method: arguments of `measure`}.

    With the text, the prior mean of an argument is the score of a text model trained on
    other topics, on labels that are the published method's posteriors.  The
    margins then go to the E-step of one more EM, as in `learn_jointly`.
    """
    grid, single = features.shape[:2], np.ones(len(seen.pair))
    fit = functools.partial(
        crowds.fit_strengths,
        seen.at,
        seen.item,
        seen.worker,
        seen.sign,
        num_workers=num_workers,
        spread=protocol.crowd_spread,
        prior=protocol.prior,
    )
    published = fit(scores=np.zeros(grid))
    strength = np.asarray(published.strength, np.float64).reshape(grid)
    plain = crowds.differences(strength, seen.at)
    soft = 1 / (1 + np.exp(-plain))
    scores = crossed_scores(
        lambda trains: text_model(seen, features, soft, single * trains, protocol),
        features,
        seen.at,
        folds=protocol.folds,
    )
    informed = fit(scores=scores, shared=seen.item)
    outside = np.zeros(len(seen.pair))
    outside[seen.item] = np.asarray(informed.margins, np.float64) * seen.sign
    trust = protocol.crowd_trust[list(REGIMES).index(regime)]
    final = reliabilities(seen, trust * outside, num_workers, protocol.prior)
    logits = pair_logits(seen, final)
    share = crowds.share_right(informed, seen.worker, protocol.prior)
    return {
        "Crowd-BT, no text": {
            "logits": plain,
            "reliability": np.asarray(published.reliability),
        },
        "Crowd-BT, text": {
            "logits": logits,
            "reliability": np.asarray(final.reliability),
        },
        "Crowd-BT, text, share": {"logits": logits, "reliability": share},
    }


def audit_arms(
    seen: Votes, plain: np.ndarray, num_workers: int, size: int
) -> dict[str, dict[str, np.ndarray]]:
    """The estimates of `jaxpref audit`, without and with strengths of the answers.

    `plain` [P'] are margins of a text model of other topics, as in an audit, and `size`
    is the largest number of arguments in a topic.
    """
    topic, first, second = seen.at
    sides = np.stack([topic * size + first, topic * size + second], axis=1)[seen.item]
    votes = audit_votes.Votes(
        annotators=seen.worker,
        names=[str(k) for k in range(num_workers)],
        items=seen.item,
        texts=seen.item,
        orientation=seen.sign,
        answers=np.where(seen.sign[:, None] > 0, sides, sides[:, ::-1]),
    )
    before = estimate(
        plain[seen.item] * seen.sign,
        seen.worker,
        items=seen.item,
        orientation=seen.sign,
        num_annotators=num_workers,
        assumed_flip_rate=0.1,
    )
    after = with_strengths(before, votes, assumed_flip_rate=0.1)

    def arm(found) -> dict[str, np.ndarray]:
        logits = np.zeros(len(seen.pair))
        p = np.clip(found.posterior, 1e-9, 1 - 1e-9)
        logits[seen.item] = seen.sign * np.log(p / (1 - p))
        return {"logits": logits, "reliability": found.reliability}

    return {"audit, text margins": arm(before), "audit, strengths": arm(after)}


# ---- measurements -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judge:
    """Ground truth for evaluation, which the methods never see."""

    gold: np.ndarray
    """int [P]; 0 if unknown, or if used to choose settings."""
    ranked: np.ndarray
    """bool [K]; workers with enough votes on these pairs."""
    agreement: np.ndarray
    """float [K]; share of a worker's votes that agree with gold."""
    without: np.ndarray
    """float [K]; the same with a gold label that excludes the worker's own votes."""


def make_judge(world: World) -> Judge:
    """Agreement with gold, and with the other workers' votes.

    Gold was estimated from these votes, so part of a worker's agreement with it comes
    from the worker's own votes.  `without` instead uses Dawid and Skene's estimate from
    the other votes on the pair; pairs with a single vote are left out.
    """
    gold = np.where(world.held_back, 0, world.gold)
    judged = gold[world.pairs] != 0
    count = len(world.names)
    everyone = see(world, 5, seed=0)
    fit = reliabilities(everyone, np.zeros(len(everyone.pair)), count, em.PRIOR)
    others = np.asarray(fit.evidence)

    def share(right, counted):
        votes = np.bincount(world.workers[counted], minlength=count)
        found = np.bincount(world.workers[counted], right[counted], count)
        return found / np.maximum(votes, 1), votes

    agreement, votes = share(world.signs == gold[world.pairs], judged)
    without, _ = share(others > 0, judged & (np.abs(others) > 1e-3))
    return Judge(gold, votes >= ENOUGH, agreement, without)


def measure(seen: Votes, judge: Judge, *, held_out=None, logits=None, reliability=None):
    """Results of one method.

    `held_out` [P'] are margins from a model that never saw the pair's topic.  `logits`
    [P'] of "the first is better" are used to find wrong votes, and `reliability` [K] to
    rank workers.
    """
    gold = judge.gold[seen.pair]
    found = {}
    if held_out is not None:
        right = (held_out * gold)[gold != 0]
        found["accuracy"] = float(np.mean(right > 0))
    if logits is not None:
        counted = gold[seen.item] != 0
        wrong = seen.sign != gold[seen.item]
        doubt = -seen.sign * logits[seen.item]
        found["auroc"] = area(doubt[counted], wrong[counted])
    if reliability is not None:
        compare = lambda truth: rank_correlation(
            reliability[judge.ranked], truth[judge.ranked]
        )
        found["spearman"] = compare(judge.agreement)
        found["spearman_without"] = compare(judge.without)
    return found


def run(world: World, judge: Judge, features, lengths, protocol, regime, seed):
    """All methods on one draw of the votes: {method: results}, and the joint fit."""
    count = len(world.names)
    seen = see(world, REGIMES[regime], seed=seed)
    trust = protocol.trust[list(REGIMES).index(regime)]
    ones = seen.total(np.ones(len(seen.item)))
    share = seen.total(seen.sign > 0) / ones
    learn = lambda x, soft, weights: learn_from(seen, x, soft, weights, protocol)
    s = lambda x: 1 / (1 + np.exp(-x))
    found = {}

    def note(name, **given):
        found[name] = measure(seen, judge, **given)

    margin = learn(lengths, share, ones)
    note("length alone", held_out=margin, logits=margin)
    plain = learn(features, share, ones)
    note("plain BT", held_out=plain, logits=plain)
    e = protocol.smoothing
    margin = learn(features, e + (1 - 2 * e) * share, ones)
    note("label smoothing", held_out=margin, logits=margin)
    balance = seen.total(seen.sign)
    margin = learn(features, (1 + np.sign(balance)) / 2, (balance != 0).astype(float))
    note("majority vote", held_out=margin, logits=balance)

    single = np.ones(len(seen.pair))
    fit = reliabilities(seen, 0 * plain, count, protocol.prior)
    logits = pair_logits(seen, fit)
    margin = learn(features, s(logits), single)
    eta = np.asarray(fit.reliability)
    note("Dawid-Skene, no text", held_out=margin, logits=logits, reliability=eta)

    fit = reliabilities(seen, plain, count, protocol.prior)
    logits = pair_logits(seen, fit)
    margin = learn(features, s(logits), single)
    eta = np.asarray(fit.reliability)
    note("EM, text margins", held_out=margin, logits=logits, reliability=eta)

    for name, given in crowd_arms(seen, features, count, protocol, regime).items():
        note(name, held_out=learn(features, s(given["logits"]), single), **given)

    for name, given in audit_arms(seen, plain, count, features.shape[1]).items():
        note(name, **given)

    rate = 1 - float(np.mean(eta[seen.worker]))
    margin = crossed(
        lambda trains: reviewed_model(
            seen, features, np.sign(balance), trains, protocol, noise_rate=rate
        ),
        features,
        seen.at,
        folds=protocol.folds,
    )
    note("CRM", held_out=margin, logits=margin)

    joint = lambda trains: learn_jointly(seen, features, count, protocol, trust, trains)

    def refitted(trains):
        # Reliabilities, too, are learned without the held-out topics.
        believed = pair_logits(seen, joint(trains)[1], trains[seen.item])
        return text_model(seen, features, s(believed), single * trains, protocol)

    margin = crossed(refitted, features, seen.at, folds=protocol.folds)
    _, fit, _ = joint(None)
    logits, eta = pair_logits(seen, fit), np.asarray(fit.reliability)
    note("EM, jointly", held_out=margin, logits=logits, reliability=eta)

    # The oracle: trained on the gold labels of all other topics.
    gold = world.gold[seen.pair]
    margin = learn(features, (1 + gold) / 2, (gold != 0).astype(float))
    judged = judge.gold[seen.pair][seen.item] != 0
    right = np.bincount(
        seen.worker, judged * (seen.sign == gold[seen.item]), minlength=count
    )
    votes = np.bincount(seen.worker, judged, minlength=count)
    note("oracle", held_out=margin, reliability=right / np.maximum(votes, 1))
    return found, fit


# ---- the experiment -----------------------------------------------------------------


def main(options: Options) -> None:
    """Runs the whole experiment and writes the report."""
    started = time.perf_counter()
    protocol, out = Protocol(), Path(options.out or "runs/annotators")
    if options.smoke:
        protocol = Protocol(seeds=(0,), dimensions=32, rounds=3, folds=2)
        out = Path(options.out or "runs/annotators_smoke")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror})") from error
    path = Path(options.data or "inputs/ukpconvarg1_votes.jsonl.gz")
    if options.smoke and options.data is None:
        path = out / "votes.jsonl.gz"
        ukp.write_stand_in(path)
    world = ukp.read(path)
    features = ukp.text_features(world, dimensions=protocol.dimensions)
    lengths = ukp.length_features(world)
    judge = make_judge(world)
    say(started, f"{len(world.pairs)} votes, {world.ties} ties left out; text read")
    records, workers = [], {}
    for regime, votes in REGIMES.items():
        # With all votes, there is only one draw.
        for seed in protocol.seeds if votes < 5 else protocol.seeds[:1]:
            found, fit = run(world, judge, features, lengths, protocol, regime, seed)
            records += [
                {"regime": regime, "votes": votes, "seed": seed, "arm": name, **numbers}
                for name, numbers in found.items()
            ]
            if seed == protocol.seeds[0]:
                workers[regime] = workers_of(fit, judge)
            joint, oracle = found["EM, jointly"], found["oracle"]
            say(
                started,
                f"{regime}, seed {seed}: joint EM accuracy {joint['accuracy']:.3f},"
                f" AUROC {joint['auroc']:.3f}, Spearman {joint['spearman']:.2f}"
                f" (oracle {oracle['spearman']:.2f})",
            )
    facts = {
        "votes": len(world.pairs),
        "ties": world.ties,
        "ranked_workers": int(judge.ranked.sum()),
        "judged_pairs": int((judge.gold != 0).sum()),
    }
    seconds = time.perf_counter() - started
    write_json(
        out / "results.json",
        {
            "protocol": json.loads(json.dumps(dataclasses.asdict(protocol))),
            "facts": facts,
            "runs": records,
            "workers": workers,
            "seconds": seconds,
        },
    )
    write_results(out, records, workers, facts, seconds=seconds, about=__doc__)


def workers_of(fit: em.Fit, judge: Judge) -> list[dict]:
    """Learned reliability with its interval, and agreement, for ranked workers."""
    columns = {
        "reliability": fit.reliability,
        "lower": fit.lower,
        "upper": fit.upper,
        "votes": fit.counts,
        "agreement": judge.agreement,
        "without": judge.without,
    }
    columns = {name: np.asarray(x, np.float64) for name, x in columns.items()}
    return [
        {name: float(x[k]) for name, x in columns.items()}
        for k in np.flatnonzero(judge.ranked)
    ]


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
