"""Which of several answers to a prompt is kept, from rewards and from agreement.

Axes: n answers to one prompt.  A reward is NaN if it could not be computed; such an
answer is chosen only if there is no other.
"""

import collections
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

Rewards = Float[np.ndarray, " n"]


def best_of_n(rewards: Rewards) -> int:
    """argmax_i r_i: the answer with the largest reward, and of equal ones the first.

    If p is the distribution of answers, the KL divergence of the chosen one from p is
    at most log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879).
    """
    return int(np.argmax(_known(rewards)))


def pessimistic_best_of_n(
    rewards: Rewards, stds: Float[np.ndarray, " n"], *, penalty: float
) -> int:
    """argmax_i r_i - penalty * std_i: the largest lower bound of the reward.

    Best-of-n finds the answers whose reward is overestimated; these have uncertain
    rewards.  Coste et al. 2023, arXiv:2310.02743 (uncertainty-weighted optimization,
    there with the variance in place of the standard deviation).

    Args:
        rewards: r_i, such as means over an ensemble.
        stds: their standard deviations.
        penalty: 0 is `best_of_n`.
    """
    return int(np.argmax(_known(np.asarray(rewards) - penalty * np.asarray(stds))))


def majority_vote(answers: Sequence[Hashable | None]) -> int:
    """The first of the answers that are given most often (self-consistency).

    Wang et al. 2022, arXiv:2203.11171.

    Args:
        answers: what each sample answers, such as its last number; None for a sample
            without an answer, which does not vote.  Of equally frequent answers, the
            one that was given first wins.

    Returns:
        The index of a sample; 0 if none has an answer.
    """
    counts = collections.Counter(x for x in answers if x is not None)
    return answers.index(counts.most_common(1)[0][0]) if counts else 0


def best_of_majority(
    answers: Sequence[Hashable | None],
    rewards: Rewards,
    *,
    min_frequency: float,
    k: int = 1,
) -> list[int]:
    """The k best of the answers that are given often enough.

        C = {a : #{i : a_i = a} / n >= min_frequency},   the top k of C by reward

    A large reward of an answer that the model rarely gives is more likely to be an
    error of the reward model, so this does not get worse with n, as best-of-n does.
    Di et al. 2025, arXiv:2510.03199.

    Args:
        answers: what each sample answers; None for a sample without an answer.
        rewards: of the samples.  An answer's reward is the mean over those of its
            samples whose reward could be computed.
        min_frequency: the threshold, in [0, 1].  If no answer reaches it, those that
            are given most often are kept.
        k: the maximum number of answers.

    Returns:
        For each chosen answer, from the best on, its sample with the largest reward.
    """
    rewards = np.asarray(rewards, float)
    samples: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, answer in enumerate(answers):
        if answer is not None:
            samples[answer].append(index)
    if not samples:
        return [best_of_n(rewards)]
    most = max(map(len, samples.values()))
    least = min(min_frequency * len(answers), most)
    kept = [own for own in samples.values() if len(own) >= least]
    means = _known(np.array([mean_of_known(rewards[own]) for own in kept]))
    best = np.argsort(-means, kind="stable")[:k]  # the first of equals
    return [kept[n][best_of_n(rewards[kept[n]])] for n in best]


def minimum_bayes_risk(utilities: Float[np.ndarray, "n n"]) -> int:
    """argmax_i mean_j u(y_i, y_j): the answer that agrees best with all samples.

    Kumar and Byrne 2004 (N04-1022), with the samples as candidates and as evidence.

    Args:
        utilities: u(y_i, y_j), such as a similarity of the texts.
    """
    return best_of_n(np.mean(utilities, axis=1))


def mean_of_known(rewards: Sequence[float] | Rewards) -> float:
    """The mean of the rewards that are not NaN; NaN if there are none."""
    rewards = np.asarray(rewards, float)
    known = rewards[~np.isnan(rewards)]
    return float(np.mean(known)) if len(known) else float("nan")


def _known(rewards: Rewards) -> Rewards:
    """The rewards with -inf for those that could not be computed."""
    rewards = np.asarray(rewards, float)
    return np.where(np.isnan(rewards), -np.inf, rewards)
