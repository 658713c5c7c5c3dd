"""Metrics of how rewards rank the answers of lists, against their scores or ranks.

Pure numpy functions in float64 for the host, on all lists at once.  Lists with fewer
answers than others lack the last ones.  Answers whose rewards are equal share their
mean rank, so no metric depends on the order in which a record has them.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.evaluate.bootstrap import prompt_bootstrap

Lists = Float[np.ndarray, "lists answers"]
Exists = Bool[np.ndarray, "lists answers"]
PerList = Float[np.ndarray, " lists"]

OF_LISTS = ("accuracies", "kendall_tau", "spearman", "top1", "ndcg")
"""The metrics of each list in `per_list`."""


def list_metrics(
    rewards: Lists,
    qualities: Lists,
    where: Exists,
    prompts: Int[np.ndarray, " lists"],
) -> dict[str, float]:
    """Means over lists of `per_list`, and best-of-n, with 95% intervals over prompts.

    Args:
      rewards: reward of each answer; [lists, answers].
      qualities: scores of the answers, larger is better; of ranks, the share of the
        other answers that are ranked below; [lists, answers].
      where: which answers are there; [lists, answers].
      prompts: a number that lists of the same prompt share; [lists].

    Returns:
      `lists`; `prompts`; `answers`, the mean number in a list; `rewards/` and each of
      `OF_LISTS`; `best_of_n/quality`, the mean quality of the answer with the highest
      reward of its list, and `best_of_n/gain`, the gain in quality over a random answer
      of the list divided by that of its best answer (ratio of the means): 1 if the best
      is always chosen, 0 for random choice.  With bootstrap intervals over prompts
      (`..._low`, `..._high`).  `best_of_n/random` and `best_of_n/best` are the mean
      qualities of a random and of the best answer.

    Raises:
      ValueError: if shapes differ, there is no list, a reward is NaN, or all answers of
        a list are equally good.
    """
    found = per_list(rewards, qualities, where)
    chosen, random, best = chosen_qualities(rewards, qualities, where)

    def statistics(weights: PerList) -> dict[str, float]:
        mean = lambda values: float(weights @ values / weights.sum())
        gain = mean(chosen - random) / mean(best - random)
        means = {f"rewards/{name}": mean(values) for name, values in found.items()}
        return means | {"best_of_n/quality": mean(chosen), "best_of_n/gain": gain}

    return {
        "lists": len(where),
        "prompts": len(np.unique(prompts)),
        "answers": float(np.sum(where, axis=1).mean()),
        **prompt_bootstrap(statistics, prompts),
        "best_of_n/random": float(random.mean()),
        "best_of_n/best": float(best.mean()),
    }


def per_list(rewards: Lists, qualities: Lists, where: Exists) -> dict[str, PerList]:
    """How the ranking by rewards agrees with that by qualities, for each list.

        accuracies   share of pairs with different qualities in the right order; a tie
                     of rewards counts 1/2
        kendall_tau  (C - D) / sqrt((P - T_r) (P - T_q)), tau-b: of P pairs, C are in
                     the same order, D in the opposite one, and T tie
        spearman     correlation of the ranks
        top1         whether the answer with the highest reward is one of the best
        ndcg         DCG = sum over i of (2^g_i - 1) / log2(1 + t_i), divided by that of
                     the right ranking; g_i is the share of the other answers that are
                     worse than i, and t_i the rank of its reward

    tau-b and Spearman's correlation are 0 if all rewards are equal.

    Args:
      rewards: reward of each answer; [lists, answers].
      qualities: larger is better; [lists, answers].
      where: which answers are there; [lists, answers].

    Returns:
      Float64 [lists] by the names of `OF_LISTS`.

    Raises:
      ValueError: as `list_metrics`.

    References:
      Kendall, "The treatment of ties in ranking problems", 1945 (tau-b).
      Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques", 2002.
    """
    rewards, qualities, where = _checked(rewards, qualities, where)
    reward_signs, signs = _signs(rewards, where), _signs(qualities, where)
    total = lambda x: np.sum(x, axis=(1, 2)) / 2
    agreement = total(reward_signs * signs)
    pairs, untied = total(signs != 0), total(reward_signs != 0)
    right = total((signs != 0) * (1 + reward_signs * signs) / 2)
    rank, true_rank = _ranks(reward_signs, where), _ranks(signs, where)
    others = np.sum(where, axis=1, keepdims=True) - 1
    gain = np.where(where, np.exp2(np.sum(signs > 0, axis=2) / others) - 1, 0)
    dcg = lambda gain, rank: np.sum(gain / np.log2(1 + rank), axis=1)
    ideal = dcg(-np.sort(-gain, axis=1), 1 + np.arange(gain.shape[1]))
    is_best = where & ~np.any(signs < 0, axis=2)
    return {
        "accuracies": right / pairs,
        "kendall_tau": agreement / np.sqrt(pairs * np.maximum(untied, 1)),
        "spearman": _correlation(rank, true_rank, where),
        "top1": _of_chosen(reward_signs, is_best, where),
        "ndcg": dcg(gain, rank) / ideal,
    }


def chosen_qualities(
    rewards: Lists, qualities: Lists, where: Exists
) -> tuple[PerList, PerList, PerList]:
    """Quality of each list's answer with the highest reward, a random one, the best.

    Of answers that share the highest reward, the mean.  Arguments and errors are those
    of `per_list`.
    """
    rewards, qualities, where = _checked(rewards, qualities, where)
    count = np.sum(where, axis=1)
    return (
        _of_chosen(_signs(rewards, where), qualities, where),
        np.sum(np.where(where, qualities, 0), axis=1) / count,
        np.max(np.where(where, qualities, -np.inf), axis=1),
    )


def _signs(x: Lists, where: Exists) -> np.ndarray:
    """[n, i, j]: 1 if answer i has more than j, -1 if less, 0 if as much or missing."""
    both = where[:, :, None] & where[:, None, :]
    return np.where(both, np.sign(x[:, :, None] - x[:, None, :]), 0.0)


def _ranks(signs: np.ndarray, where: Exists) -> Lists:
    """Ranks from 1, the most first; answers with as much share their mean rank."""
    both = where[:, :, None] & where[:, None, :]
    equal = np.sum(both & (signs == 0), axis=2) - where
    return 1 + np.sum(signs < 0, axis=2) + equal / 2


def _of_chosen(signs: np.ndarray, values: np.ndarray, where: Exists) -> PerList:
    """The value of the answer with the highest reward; of several, the mean."""
    top = where & ~np.any(signs < 0, axis=2)
    return np.sum(np.where(top, values, 0), axis=1) / np.sum(top, axis=1)


def _correlation(a: Lists, b: Lists, where: Exists) -> PerList:
    """Pearson's correlation over the answers of each list; 0 if `a` is constant."""
    count = np.sum(where, axis=1, keepdims=True)
    centered = lambda x: np.where(
        where, x - np.sum(np.where(where, x, 0), axis=1, keepdims=True) / count, 0
    )
    a, b = centered(a), centered(b)
    scale = np.sqrt(np.sum(a**2, axis=1) * np.sum(b**2, axis=1))
    return np.sum(a * b, axis=1) / np.where(scale > 0, scale, 1)


def _checked(rewards, qualities, where) -> tuple[Lists, Lists, Exists]:
    rewards, qualities = (np.asarray(x, np.float64) for x in (rewards, qualities))
    where = np.asarray(where, bool)
    if not (rewards.shape == qualities.shape == where.shape and where.ndim == 2):
        raise ValueError(
            f"Expected equal shapes [lists, answers], got {rewards.shape}, "
            f"{qualities.shape}, and {where.shape}."
        )
    if not len(where) or np.isnan(rewards[where]).any():
        raise ValueError("Expected at least one list, and no reward that is NaN.")
    rewards, qualities = (np.where(where, x, 0) for x in (rewards, qualities))
    if not np.any(_signs(qualities, where), axis=(1, 2)).all():
        raise ValueError("Expected a best and a worse answer in every list.")
    return rewards, qualities, where
