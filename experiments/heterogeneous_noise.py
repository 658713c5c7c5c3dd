"""Noise that is not the same for all pairs: exact policies at matched KL.

Claim
    A correction with one flip rate for all labels helps little if annotators differ,
    and does harm if some of the labels follow the length of the answers.  Knowing the
    annotators and their flip rates is worth most where data are scarce or labels are
    biased.  The rates can mostly be learned with the policy
    (`--objective instance_noise`).

Commands
    python -m experiments.heterogeneous_noise
    python -m experiments.heterogeneous_noise --pairs 2048    (a few minutes)

Expected
    Reward at KL 0.64, and share of the best possible reward at this KL; mean over
    seeds 0 to 4, which differ in world, pairs, and labels.  The standard deviations
    are 0.02 to 0.05 for the reward and at most 0.05 for the share.

     2,048 pairs                     two annotators       adversary  half by length
    DPO, clean labels                      1.06 0.95       1.06 0.95       1.06 0.95
    DPO                                    0.92 0.82       0.91 0.81       0.56 0.50
    forward, known mean rate               0.93 0.82       0.91 0.81       0.55 0.49
    forward, known rate of each pair       0.98 0.88       1.05 0.93       1.00 0.90
    learned by annotator                   0.98 0.88       1.04 0.93       0.55 0.49
    learned by length                      0.92 0.82       0.91 0.81       0.93 0.83
    learned by annotator and length        0.98 0.87       1.04 0.93       1.00 0.90

    16,384 pairs                     two annotators       adversary  half by length
    DPO, clean labels                      1.11 0.99       1.11 0.99       1.11 0.99
    DPO                                    1.09 0.97       1.09 0.97       0.61 0.54
    forward, known mean rate               1.09 0.97       1.09 0.97       0.54 0.48
    forward, known rate of each pair       1.10 0.98       1.11 0.99       1.11 0.99
    learned by annotator                   1.10 0.98       1.11 0.99     -0.03 -0.02
    learned by length                      1.09 0.97       1.09 0.97       1.10 0.98
    learned by annotator and length        1.10 0.98       1.11 0.99       1.11 0.99

    One rate for all labels is no better than DPO, and with labels given by length it is
    worse.  Learned rates are as good as known ones, if they can depend on what causes
    the flips.  With rates by annotator alone, an annotator who always picks the longer
    answer looks perfectly consistent, and with 16,384 pairs the policy learns little
    but length.  If the annotators are unknown, the length alone recovers most.
    Time: 8 minutes for 2,048 pairs and 38 for 16,384, with one thread, on two cores of
    an Intel Xeon that were busy with 20 other processes.

Protocol
    2,000 answers, equally likely under the reference, with 80 normal features.  Reward
    and log-length are two orthogonal directions of the features, with standard
    deviations of 1 and 0.5.  Pairs are drawn at random, and labeled by Bradley-Terry of
    the reward.  The labels of two known annotators then differ.  "Two annotators": half
    of the labels each, with flip rates of 5% and 40%.  "Adversary": 30% of the labels
    with a flip rate of 80%, and clean labels by the other.  "Half by length": half of
    the labels by length alone, and clean labels by the other.
    A policy is exp(theta . features); its margin is z = theta . (difference of the
    features).  theta has the highest likelihood of the labels under a penalty
    ridge |theta|^2 / 2, and is rescaled to KL 0.64 for the comparison, so that beta
    makes no difference.  The penalty plays the role of early stopping.  For every
    method, kind of noise, and number of pairs, it is the one of six (1 to 1,000) with
    the highest mean reward on seeds 100 and 101.  "Known mean rate": forward DPO with
    the mean flip rate, 1/4 for labels by length.  "Known rate of each pair": forward
    DPO with the rates of the description above.  "Learned": the jointly most likely
    theta and coefficients of `jaxpref.noise.instance`, with the prior `PRIOR` for all
    kinds of noise; float64.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
import tyro
from scipy.special import expit, logit, softmax

from experiments.progress import say
from jaxpref.files import write_json
from jaxpref.report import grouped_bars

ANSWERS, FEATURES = 2000, 80
KL = 0.64
"""The KL at which all policies are compared, nats."""
RIDGES = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Strengths of the penalty |theta|^2 / 2 to choose from."""
TUNED_ON, REPORTED = (100, 101), (0, 1, 2, 3, 4)
"""Seeds that choose the penalty, and seeds of the table."""
PRIOR = {"rate": 0.1, "spread": 1.0, "length": 2.0, "annotators": 2.0}
"""Prior of the learned flip rates, as the options of `instance_noise`, with largest =
1 throughout."""


@dataclasses.dataclass(frozen=True)
class Annotator:
    """One of a few known annotators."""

    share: float
    flip_rate: float = 0.0
    by_length: bool = False
    """Whether the labels name the longer answer, whatever the truth."""


NOISES = {
    "two annotators": (Annotator(0.5, 0.05), Annotator(0.5, 0.4)),
    "adversary": (Annotator(0.7), Annotator(0.3, 0.8)),
    "half by length": (Annotator(0.5), Annotator(0.5, by_length=True)),
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Labeled pairs; all differences are of the labeled answer minus the other one."""

    features: np.ndarray
    """[N, FEATURES]"""
    length: np.ndarray
    """tanh(2 log(length ratio)), as `instance_noise` computes it; [N]."""
    annotator: np.ndarray
    """[N]"""


@dataclasses.dataclass(frozen=True)
class World:
    """Answers to one prompt, all equally likely under the reference."""

    features: np.ndarray
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


def draw_pairs(world: World, count: int, noise: str | None, seed: int) -> Pairs:
    """Random pairs with Bradley-Terry labels, then noise; one seed, the same pairs."""
    rng = np.random.default_rng((seed, 1))
    first, second = rng.integers(0, ANSWERS, (2, count))
    right = rng.random(count) < expit(world.reward[first] - world.reward[second])
    u, v = rng.random((2, count))
    annotators = NOISES[noise] if noise else (Annotator(1.0),)
    shares = np.cumsum([annotator.share for annotator in annotators])
    who = np.minimum(np.searchsorted(shares, u, side="right"), len(annotators) - 1)
    rates = np.array([annotator.flip_rate for annotator in annotators])[who]
    label = np.where(v < rates, ~right, right)
    by_length = np.array([annotator.by_length for annotator in annotators])[who]
    longer = world.log_length[first] > world.log_length[second]
    label = np.where(by_length, longer, label)
    chosen, rejected = np.where(label, first, second), np.where(label, second, first)
    ratio = world.log_length[chosen] - world.log_length[rejected]
    return Pairs(
        world.features[chosen] - world.features[rejected], np.tanh(2 * ratio), who
    )


def true_rates(pairs: Pairs, noise: str) -> tuple[np.ndarray, np.ndarray]:
    """(e, e') of each pair: the flip rates if the labeled or other answer is better."""
    annotators = NOISES[noise]
    rate = np.array([annotator.flip_rate for annotator in annotators])[pairs.annotator]
    by_length = np.array([x.by_length for x in annotators])[pairs.annotator]
    shorter = (pairs.length < 0).astype(float)
    return np.where(by_length, shorter, rate), np.where(by_length, 1 - shorter, rate)


def pooled_rate(pairs: Pairs, noise: str) -> float:
    """The mean flip rate, where half of the labels by length are wrong."""
    e, swapped = true_rates(pairs, noise)
    return float(np.mean(e + swapped) / 2)


def newton(value, derivatives, start, steps=40):
    """The minimum near `start`: Fisher scoring with backtracking, in float64."""
    x, now = start, value(start)
    for _ in range(steps):
        gradient, information = derivatives(x)
        step = np.linalg.solve(information, gradient)
        size = 1.0
        while (new := value(x - size * step)) > now and size > 1e-4:
            size /= 2
        x = x - size * step
        if now - new < 1e-3:
            break
        now = new
    return x


def fit_known(pairs: Pairs, e, swapped, *, ridge: float) -> np.ndarray:
    """The policy for given flip rates: -log((1 - e) s(z) + e' s(-z)), z = theta . x."""
    x = pairs.features

    def probability(theta):
        z = x @ theta
        return np.maximum((1 - e) * expit(z) + swapped * expit(-z), 1e-12), z

    def value(theta):
        return -np.log(probability(theta)[0]).sum() + ridge * theta @ theta / 2

    def derivatives(theta):
        p, z = probability(theta)
        gradient = (1 - e - swapped) * expit(z) * expit(-z)
        weight = gradient**2 / np.maximum(p * (1 - p), 1e-12)
        information = (x * weight[:, None]).T @ x + ridge * np.eye(FEATURES)
        return -x.T @ (gradient / p) + ridge * theta, information

    return newton(value, derivatives, np.zeros(FEATURES))


def fit_learned(
    pairs: Pairs, *, ridge: float, length: bool, annotators: bool
) -> np.ndarray:
    """Policy and flip rates, jointly most likely: `--objective instance_noise`.

    Unlike the objective, it does not estimate a scale of the margins, because this is
    an optimum and not a training run.  It starts from the policy for a constant rate.
    """
    ends = np.ones((len(pairs.length), 1))
    names = pairs.annotator if annotators else 0 * pairs.annotator
    rows = int(pairs.annotator.max()) + 1 if annotators else 1
    odd = pairs.length[:, None] if length else ends[:, :0]
    common, other = np.hstack([ends, odd]), np.hstack([ends, -odd])
    spread = [PRIOR["spread"], *([PRIOR["length"]] if length else [])]
    if annotators:
        own = np.eye(rows)[names]
        expand = lambda x: np.hstack([x, *(x * own[:, [k]] for k in range(rows))])
        spread += [PRIOR["annotators"]] * (rows * common.shape[1])
        common, other = expand(common), expand(other)
    mean = np.zeros(len(spread))
    mean[0] = logit(PRIOR["rate"])
    precision = np.diag([ridge] * FEATURES + [s**-2.0 for s in spread])
    x, center = pairs.features, np.concatenate([np.zeros(FEATURES), mean])

    def parts(both):
        z, w = x @ both[:FEATURES], both[FEATURES:]
        e, swapped = expit(common @ w), expit(other @ w)
        p = (1 - e) * expit(z) + swapped * expit(-z)
        return np.maximum(p, 1e-12), z, e, swapped

    def value(both):
        away = both - center
        return -np.log(parts(both)[0]).sum() + away @ precision @ away / 2

    def derivatives(both):
        p, z, e, swapped = parts(both)
        by_policy = ((1 - e - swapped) * expit(z) * expit(-z))[:, None] * x
        by_rate = (expit(-z) * swapped * (1 - swapped))[:, None] * other
        by_rate -= (expit(z) * e * (1 - e))[:, None] * common
        gradient = np.hstack([by_policy, by_rate])
        weight = 1 / np.maximum(p * (1 - p), 1e-12)
        information = (gradient * weight[:, None]).T @ gradient + precision
        return -gradient.T @ (1 / p) + precision @ (both - center), information

    start = fit_known(pairs, PRIOR["rate"], PRIOR["rate"], ridge=ridge)
    return newton(value, derivatives, np.concatenate([start, mean]))[:FEATURES]


METHODS = {
    "DPO, clean labels": lambda pairs, noise, ridge: fit_known(
        pairs, 0.0, 0.0, ridge=ridge
    ),
    "DPO": lambda pairs, noise, ridge: fit_known(pairs, 0.0, 0.0, ridge=ridge),
    "forward, known mean rate": lambda pairs, noise, ridge: fit_known(
        pairs, *[pooled_rate(pairs, noise)] * 2, ridge=ridge
    ),
    "forward, known rate of each pair": lambda pairs, noise, ridge: fit_known(
        pairs, *true_rates(pairs, noise), ridge=ridge
    ),
    "learned by annotator": lambda pairs, noise, ridge: fit_learned(
        pairs, ridge=ridge, length=False, annotators=True
    ),
    "learned by length": lambda pairs, noise, ridge: fit_learned(
        pairs, ridge=ridge, length=True, annotators=False
    ),
    "learned by annotator and length": lambda pairs, noise, ridge: fit_learned(
        pairs, ridge=ridge, length=True, annotators=True
    ),
}
CLEAN = "DPO, clean labels"


def at_matched_kl(score: np.ndarray, reward: np.ndarray) -> float:
    """The expected reward of exp(c score), with c such that the KL is `KL`."""

    def policy(c):
        weights = softmax(c * score)
        return weights, np.sum(weights * np.log(weights * ANSWERS + 1e-300))

    low, high = 0.0, 100.0 / max(score.std(), 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle)[1] < KL else (low, middle)
    return float(policy(low)[0] @ reward)


def measure(method: str, noise: str, count: int, ridge: float, seed: int) -> dict:
    """Reward of one fit, and the best possible one at the same KL."""
    world = make_world(seed)
    pairs = draw_pairs(world, count, None if method == CLEAN else noise, seed)
    theta = METHODS[method](pairs, noise, ridge)
    reward = at_matched_kl(world.features @ theta, world.reward)
    best = at_matched_kl(world.reward, world.reward)
    return {"reward": reward, "share_of_best_possible": reward / best, "kl": KL}


def tuned(method: str, noise: str, count: int) -> float:
    """The penalty with the highest mean reward on the seeds for tuning."""
    mean = lambda ridge: np.mean(
        [measure(method, noise, count, ridge, s)["reward"] for s in TUNED_ON]
    )
    return max(RIDGES, key=mean)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the experiment."""

    out: str = "runs/heterogeneous_noise"
    """Output folder."""
    pairs: tuple[int, ...] = (2048, 16_384)
    """Numbers of pairs."""


def main(options: Options) -> None:
    """Fits everything, prints the table, and writes results.json and the figures."""
    clock, records = functools.partial(say, time.perf_counter()), []
    for count in options.pairs:
        for noise in NOISES:
            for method in METHODS:
                ridge = tuned(method, noise, count)
                cell = {"method": method, "noise": noise, "pairs": count}
                found = [
                    cell
                    | {"ridge": ridge, "seed": seed}
                    | measure(method, noise, count, ridge, seed)
                    for seed in REPORTED
                ]
                records += found
                rewards = [record["reward"] for record in found]
                share = np.mean([record["share_of_best_possible"] for record in found])
                clock(
                    f"{count:6} pairs, {noise:15} {method:32} reward "
                    f"{np.mean(rewards):.3f} +- {np.std(rewards, ddof=1):.3f} "
                    f"share {share:.3f} ridge {ridge:g}"
                )
    Path(options.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(options.out) / "results.json", json.loads(json.dumps(records)))
    for count in options.pairs:
        grouped_bars(
            Path(options.out) / f"shares-{count}.png",
            [record for record in records if record["pairs"] == count],
            value="share_of_best_possible",
            group="noise",
            arm="method",
            y_label="share of the best possible reward",
            title=f"Exact policies at the same KL, {count:,} pairs",
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
