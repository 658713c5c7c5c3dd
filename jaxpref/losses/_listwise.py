"""Listwise losses: several answers to a prompt, ranked or graded.

Scores come first, [*lists, items]; usually they are implicit rewards
(`implicit_rewards`), and a list of two is then a pair.  The last axis holds the items
and must not be sharded; lists may be sharded in any way.  Ranks are computed by
comparing all items with each other, so nothing is sorted or moved.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from jaxpref.losses import _common

__all__ = ["irpo", "lipo_lambda", "plackett_luce"]

Items = Float[Array, "*lists items"]
Labels = Real[Array, "*lists items"]
ItemMask = Bool[Array, "*lists items"] | None


def plackett_luce(scores: Items, *, where: ItemMask = None) -> Float[Array, "*lists"]:
    """Negative log-likelihood of a ranking, best item first: listwise DPO, ListMLE.

        loss = sum over i of [log sum over j >= i of exp(s_j)  -  s_i]

    The Plackett-Luce model picks the best item by softmax, then the best of the rest,
    and so on.  With implicit rewards as scores it is listwise DPO; two items give DPO.
    Convex in the scores and unbounded: the gradient of an item that is ranked far too
    high does not vanish.

    Args:
      scores: one score per item, the best item first; [*lists, items].
      where: which items are real; the others are ignored; [*lists, items].

    Returns:
      One loss per list, [*lists], at least float32; >= 0, and 0 for lists of one item
      or none.

    Raises:
      TypeError: if `scores` is not floating point.
      ValueError: if it has no axis, or shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import plackett_luce
      >>> loss = plackett_luce(jnp.zeros(3))
      >>> print(f"{jnp.exp(-loss):.4f}")  # one of six orders
      0.1667

    References:
      Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, the
      appendix on the Plackett-Luce model.
      As ListMLE: Liu et al., "LiPO: Listwise Preference Optimization through
      Learning-to-Rank", 2024, arXiv:2402.01878.
    """
    scores, real, differences = _compared(scores, where)
    order = jnp.arange(scores.shape[-1])
    behind = real[..., None, :] & (order > order[:, None])
    return _sum_real(_softplus_sum(differences, behind), real)


def lipo_lambda(
    scores: Items, labels: Labels, *, where: ItemMask = None
) -> Float[Array, "*lists"]:
    """LiPO-lambda: all pairs of a list, weighted by the change in DCG if swapped.

        loss = sum over pairs with label_i > label_j of w_ij log(1 + exp(s_j - s_i))
        w_ij = |2^label_i - 2^label_j| |1 / log(1 + t_i) - 1 / log(1 + t_j)|

    t_i is the rank of item i by its current score, 1 for the highest; the weights pass
    no gradient.  Equal scores are ranked by their position in the list.  If they shared
    a rank, an untrained policy (equal to its reference, all rewards 0) would have no
    gradient.  Items with equal labels are not compared.  Two items give DPO times a
    constant.

    Args:
      scores: one score per item, usually implicit rewards; [*lists, items].
      labels: quality of each item, larger is better; the authors scale it to [0, 1];
        [*lists, items].
      where: which items are real; the others are ignored; [*lists, items].

    Returns:
      One loss per list, [*lists], at least float32; >= 0, and 0 where no two real items
      differ in label.

    Raises:
      TypeError: if `scores` is not floating point.
      ValueError: if it has no axis, or shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import lipo_lambda
      >>> labels = jnp.array([0.0, 1.0, 0.5])
      >>> right = lipo_lambda(jnp.array([-1.0, 1.0, 0.0]), labels)
      >>> wrong = lipo_lambda(jnp.array([1.0, -1.0, 0.0]), labels)
      >>> print(right < wrong)
      True

    References:
      Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank",
      2024, arXiv:2402.01878, the LiPO-lambda objective with its Lambda weight.
    """
    scores, real, differences = _compared(scores, where)
    labels = _in_place(labels, scores, real, "labels")
    order = jnp.arange(scores.shape[-1])
    # [i, j]: whether j is ranked before i.
    before = (differences > 0) | ((differences == 0) & (order < order[:, None]))
    rank = 1 + jnp.sum(before & real[..., None, :], axis=-1)
    discount = 1 / jnp.log1p(rank.astype(scores.dtype))
    gain = jnp.exp2(labels)
    apart = lambda x: jnp.abs(x[..., :, None] - x[..., None, :])
    weights = jax.lax.stop_gradient(apart(gain) * apart(discount))
    better = (labels[..., :, None] > labels[..., None, :]) & real[..., None, :]
    losses = jnp.where(better, weights * jax.nn.softplus(differences), 0)
    return _sum_real(jnp.sum(losses, axis=-1), real)


def irpo(
    scores: Items, relevances: Labels, positions: Labels, *, where: ItemMask = None
) -> Float[Array, "*lists"]:
    """In-context ranking preference optimization, with the weights of NDCG.

        loss = mean over i of w_i log(1 + mean over j != i of exp(s_j - s_i))
        w_i = (2^relevance_i - 1) / log2(1 + position_i)

    Each relevant item is compared with all others at once, with a larger weight the
    higher it should be ranked.  Items of relevance 0 have no term of their own.  Two
    items of relevances 1 and 0, the first at position 1, give half of DPO.  Not to be
    confused with the loss of Pang et al. with the same abbreviation (`iterative_rpo`).

    Args:
      scores: one score per item, usually implicit rewards; [*lists, items].
      relevances: graded relevance of each item, >= 0; [*lists, items].
      positions: target position of each item in the list, starting at 1; [*lists,
        items].
      where: which items are real; the others are ignored; [*lists, items].

    Returns:
      One loss per list, [*lists], at least float32; >= 0, and 0 for lists of one item
      or none.

    Raises:
      TypeError: if `scores` is not floating point.
      ValueError: if it has no axis, or shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import irpo
      >>> relevances, positions = jnp.array([1.0, 0.0]), jnp.array([1, 2])
      >>> print(irpo(jnp.zeros(2), relevances, positions))
      0.3465736

    References:
      Wu et al., "In-context Ranking Preference Optimization", 2025, arXiv:2504.15477,
      the IRPO objective.
      Code: rohan2810/In-context-Ranking-Preference-Optimization, trainers.py,
      `rdpo_loss`.
    """
    scores, real, differences = _compared(scores, where)
    relevances = _in_place(relevances, scores, real, "relevances")
    positions = _in_place(positions, scores, real, "positions")
    weights = (jnp.exp2(relevances) - 1) / jnp.log2(1 + jnp.where(real, positions, 1))
    others = real[..., None, :] & ~jnp.eye(scores.shape[-1], dtype=bool)
    count = jnp.sum(real, axis=-1, keepdims=True).astype(scores.dtype)
    mean = differences - jnp.log(jnp.maximum(count - 1, 1))[..., None]
    losses = _sum_real(weights * _softplus_sum(mean, others), real)
    return losses / jnp.maximum(count[..., 0], 1)


def _compared(scores, where) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores with padding at 0, which items are real, and [.., i, j] = s_j - s_i."""
    (scores,) = _common.promoted(scores=scores)
    if scores.ndim < 1:
        raise ValueError("Expected scores of shape [..., items], got a scalar.")
    real = _common.mask(where, scores)
    scores = jnp.where(real, scores, 0)
    return scores, real, scores[..., None, :] - scores[..., :, None]


def _in_place(values, scores: jax.Array, real: jax.Array, name: str) -> jax.Array:
    """`values` in the dtype of `scores`, padding at 0."""
    _common.same_shape(scores=scores, **{name: values})
    return jnp.where(real, jnp.asarray(values, scores.dtype), 0)


def _softplus_sum(differences: jax.Array, where: jax.Array) -> jax.Array:
    """log(1 + sum of exp(differences) where `where`), over the last axis."""
    some = jnp.any(where, axis=-1)
    top = jnp.max(differences, axis=-1, initial=-jnp.inf, where=where)
    top = jax.lax.stop_gradient(jnp.where(some, top, 0))
    terms = jnp.exp(jnp.where(where, differences - top[..., None], -jnp.inf))
    # If nothing is summed, use 1, so that the logarithm's gradient stays finite.
    total = jnp.where(some, jnp.sum(terms, axis=-1), 1)
    return jnp.where(some, jax.nn.softplus(top + jnp.log(total)), 0)


def _sum_real(values: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real, values, 0), axis=-1)
