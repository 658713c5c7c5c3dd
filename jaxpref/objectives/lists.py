"""Objectives of lists of answers to a prompt, with ranks or scores of the answers."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref import losses
from jaxpref.objectives.bound_loss import check_options
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective

SCORES = ("policy_logps", "reference_logps")


def plackett_luce(*, beta: float = 0.1) -> Objective:
    """Listwise DPO: the likelihood of a ranking under the Plackett-Luce model.

        loss = sum over i of [log sum over j >= i of exp(r_j)  -  r_i]
        r_i  = beta log pi(y_i|x)/ref(y_i|x),    the best answer first

    Records have a prompt, completions, and their scores or ranks, without ties: a list
    in which two answers tie is left out and counted.  A list of two is DPO.

    Metrics: those of all losses of lists.  `rewards/best` and `rewards/worst`, means of
    the first and of the last answer; `rewards/accuracies`, the share of a list's pairs
    in the right order; `rewards/ndcg`, with gains 2^q - 1, where q goes from 0 for the
    worst answer to 1 for the best.

    Args:
      beta: inverse temperature of the KL penalty, > 0.

    Raises:
      InputError: if an option is out of range.

    References:
      Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, the
      appendix on the Plackett-Luce model.
    """
    return _of_lists(
        "plackett_luce",
        "ranks",
        beta,
        lambda rewards, ranks, where: losses.plackett_luce(rewards, where=where),
    )


def lipo_lambda(*, beta: float = 0.1) -> Objective:
    """LiPO-lambda: all pairs of a list, weighted by the change in DCG if swapped.

        loss = sum over pairs with q_i > q_j of w_ij log(1 + exp(r_j - r_i))
        w_ij = |2^q_i - 2^q_j| |1 / log(1 + t_i) - 1 / log(1 + t_j)|
        r_i  = beta log pi(y_i|x)/ref(y_i|x),    t_i the rank of r_i

    Records have a prompt, completions, and their scores or ranks; answers may tie.  The
    qualities q are the scores as they are.  The authors scale them to [0, 1]; the gain
    2^q of a score of 10 is 1,024.  Of ranks, q is the share of the other answers that
    are ranked below.

    Before the first step all rewards are equal, so rounding decides their ranks in
    packed rows.  With --row-length none, the order of the record does.

    Metrics: those of all losses of lists, see `plackett_luce`.

    Args:
      beta: inverse temperature of the KL penalty, > 0; the default is that of DPO.

    Raises:
      InputError: if an option is out of range.

    References:
      Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank",
      2024, arXiv:2402.01878.
    """
    return _of_lists(
        "lipo_lambda",
        "qualities",
        beta,
        lambda rewards, labels, where: losses.lipo_lambda(rewards, labels, where=where),
    )


def irpo(*, beta: float = 0.1) -> Objective:
    """In-context ranking preference optimization, with the weights of NDCG.

        loss = mean over i of w_i log(1 + mean over j != i of exp(r_j - r_i))
        w_i  = (2^q_i - 1) / log2(1 + p_i),    r_i = beta log pi(y_i|x)/ref(y_i|x)

    Records have a prompt, completions, and their scores or ranks; answers may tie.  The
    relevances q are the scores as they are, and must be 0 or more; of ranks, q is the
    share of the other answers that are ranked below.  The target position p_i is 1 plus
    the number of answers with a higher relevance.

    Metrics: those of all losses of lists, see `plackett_luce`.

    Args:
      beta: inverse temperature of the KL penalty, > 0; the default is that of DPO.

    Raises:
      InputError: if an option is out of range.

    References:
      Wu et al., "In-context Ranking Preference Optimization", 2025, arXiv:2504.15477,
      the IRPO objective.
    """

    def of_list(rewards: Array, relevances: Array, where: Array) -> Array:
        positions = 1 + jnp.sum(_better(relevances, where), axis=-2)
        return losses.irpo(rewards, relevances, positions, where=where)

    return _of_lists("irpo", "relevances", beta, of_list)


def _of_lists(
    name: str,
    label: str,
    beta: float,
    of_list: Callable[[Array, Array, Array], Array],
) -> Objective:
    """The objective of a loss of lists.

    Args:
      name: its name.
      label: the numbers of the answers that it reads; see `OF_ANSWERS`.
      beta: scale of the implicit rewards.
      of_list: `(rewards, numbers, where) -> losses`, [..., S, K] to [..., S].
    """
    options = {"beta": beta}
    check_options(losses.implicit_rewards, options)

    def rewards(inputs: Inputs) -> Array:
        policy, reference = map(inputs.completions, SCORES)
        return losses.implicit_rewards(policy, reference, beta=beta)

    return Objective(
        name=name,
        options=options,
        reads=(*SCORES, label),
        losses=lambda inputs, state: of_list(
            rewards(inputs), inputs[label], exists(inputs)
        ),
        metrics=lambda inputs: list_metrics(inputs, rewards(inputs), inputs[label]),
    )


def exists(inputs: Inputs) -> Bool[Array, "*batch S K"]:
    """Which answers are there: shorter lists lack the last ones."""
    return jnp.asarray(inputs.batch.completion_lengths) > 0


def list_metrics(
    inputs: Inputs,
    rewards: Float[Array, "*batch S K"],
    numbers: Float[Array, "*batch S K"],
) -> Metrics:
    """Means over the lists; see `plackett_luce`.

    Args:
      inputs: the scores of a batch, and the batch.
      rewards: the implicit rewards of the answers, the best one first.
      numbers: equal for answers that tie, different for others.
    """
    where, logps = exists(inputs), inputs.completions("policy_logps")
    mean = lambda x: mean_over(x, inputs.is_pair)
    count = jnp.sum(where, axis=-1)
    place = jnp.arange(rewards.shape[-1])
    last = where & (place == count[..., None] - 1)
    of_last = lambda x: jnp.sum(jnp.where(last, x, 0), axis=-1)
    # [.., i, j]: whether answer i is to be ranked before answer j.
    differ = numbers[..., :, None] != numbers[..., None, :]
    before = differ & (place[:, None] < place)
    before &= where[..., :, None] & where[..., None, :]
    right = losses.reward_accuracies(
        *jnp.broadcast_arrays(rewards[..., :, None], rewards[..., None, :])
    )
    pairs = jnp.sum(before, axis=(-2, -1))
    share = jnp.sum(jnp.where(before, right, 0), axis=(-2, -1)) / jnp.maximum(pairs, 1)
    best, worst = rewards[..., 0], of_last(rewards)
    return {
        "logps/best": mean(logps[..., 0]),
        "logps/worst": mean(of_last(logps)),
        "rewards/best": mean(best),
        "rewards/worst": mean(worst),
        "rewards/margins": mean(best - worst),
        "rewards/accuracies": mean(share),
        "rewards/ndcg": mean(ndcg(rewards, before, where)),
    }


def ndcg(
    rewards: Float[Array, "*lists K"],
    before: Bool[Array, "*lists K K"],
    where: Bool[Array, "*lists K"],
) -> Float[Array, "*lists"]:
    """Normalized discounted cumulative gain of the ranking by rewards, from 0 to 1.

        DCG = sum over i of (2^q_i - 1) / log2(1 + t_i)

    divided by that of the right ranking.  q_i is the share of the other answers that
    are worse, and t_i the rank of reward i; the mean rank of those that are equal.

    Args:
      rewards: the rewards of the answers, the best one first.
      before: [.., i, j]: whether answer i is better than answer j.
      where: which answers are there.
    """
    others = jnp.maximum(jnp.sum(where, axis=-1, keepdims=True) - 1, 1)
    quality = jnp.sum(before, axis=-1) / others
    gain = jnp.where(where, jnp.exp2(quality) - 1, 0)
    rank = 1 + jnp.sum(_better(rewards, where), axis=-2) + _ties(rewards, where) / 2
    dcg = lambda rank: jnp.sum(gain / jnp.log2(1 + rank), axis=-1)
    ideal = dcg(1 + jnp.arange(rewards.shape[-1]))
    return dcg(rank) / jnp.maximum(ideal, 1e-12)


def _better(x: Array, where: Array) -> Bool[Array, "*lists K K"]:
    """[.., j, i]: whether answer j is there and has more than answer i."""
    return where[..., :, None] & (x[..., :, None] > x[..., None, :])


def _ties(x: Array, where: Array) -> Array:
    """How many other answers have as much, [..., K]."""
    equal = where[..., None, :] & (x[..., :, None] == x[..., None, :])
    return jnp.sum(equal, axis=-1) - where
