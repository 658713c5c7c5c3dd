"""Losses for training reward models from comparisons and ratings.

They read rewards, not log-probs.  With `implicit_rewards` they also train a policy:
`bradley_terry` of implicit rewards is `dpo`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = [
    "attribute_regression",
    "bradley_terry",
    "center_rewards",
    "davidson",
    "margin_bradley_terry",
    "rao_kupper",
    "reward_regression",
    "scaled_bradley_terry",
]

Labels = Real[Array, "*batch"]
"""Annotations other than the order, one number per pair, integer or float."""

Attributes = Float[Array, "*batch attributes"]
"""One number for each attribute of an answer."""


def bradley_terry(chosen_rewards: PerPair, rejected_rewards: PerPair) -> PerPair:
    """Negative log-likelihood of the label under the Bradley-Terry model.

        loss = -log s(r_w - r_l)

    Equal rewards give log 2.  Rewards are identified only up to a constant per prompt;
    see `center_rewards`.  The magnitude of the gradient is s(r_l - r_w), up to 1 for a
    contradicted pair.

    Args:
      chosen_rewards: r_w, rewards of the chosen answers, nats; [*batch].
      rejected_rewards: r_l, rewards of the rejected answers, nats; [*batch].

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.  The caller reduces.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import bradley_terry
      >>> print(bradley_terry(jnp.array([1.5, 0.0]), jnp.array([1.5, 0.0])))
      [0.6931472 0.6931472]

    References:
      Ouyang et al., "Training Language Models to Follow Instructions with Human
      Feedback", 2022, arXiv:2203.02155, the reward model's loss.
      Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952.
    """
    return _common.logistic_loss(
        _common.reward_difference(chosen_rewards, rejected_rewards)
    )


def margin_bradley_terry(
    chosen_rewards: PerPair, rejected_rewards: PerPair, margin: Labels
) -> PerPair:
    """Bradley-Terry with an annotated target margin.

        loss = -log s(r_w - r_l - m)

    A margin of 0 is `bradley_terry`.

    Args:
      chosen_rewards: r_w, rewards of the chosen answers, nats; [*batch].
      rejected_rewards: r_l, rewards of the rejected answers, nats; [*batch].
      margin: m, larger for clearer preferences, nats, e.g. 3 for
        significantly better, 2 for better, 1 for slightly better; integer or float;
        [*batch].

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a reward array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import margin_bradley_terry
      >>> print(margin_bradley_terry(jnp.ones(2), jnp.zeros(2), jnp.array([1, 1])))
      [0.6931472 0.6931472]

    References:
      Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", 2023,
      arXiv:2307.09288, the ranking loss with a margin.
      trl/trainer/reward_trainer.py, "margin".
    """
    difference = _common.reward_difference(chosen_rewards, rejected_rewards)
    labels = _labels(difference, margin=margin)
    return _common.logistic_loss(difference - labels)


def scaled_bradley_terry(
    chosen_rewards: PerPair, rejected_rewards: PerPair, strength: Labels
) -> PerPair:
    """Bradley-Terry weighted by the strength of the annotated preference.

        loss = -m log s(r_w - r_l)

    Equivalent to m copies of the pair.  Unlike a margin, the strength is not a target
    for the difference of the rewards.  A strength of 1 is `bradley_terry`.  The paper's
    best reward model is first trained by `reward_regression` and then by this loss: the
    two are applied in sequence, not added.

    Args:
      chosen_rewards: r_w, rewards of the chosen answers, nats; [*batch].
      rejected_rewards: r_l, rewards of the rejected answers, nats; [*batch].
      strength: m >= 0, integer or float; in the paper 1 for slightly
        better, 2 for better, 3 for much better; [*batch].

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a reward array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import scaled_bradley_terry
      >>> print(scaled_bradley_terry(jnp.ones(2), jnp.ones(2), jnp.array([1, 3])))
      [0.6931472 2.0794415]

    References:
      Wang et al., "HelpSteer2-Preference: Complementing Ratings with Preferences",
      2024, arXiv:2410.01257, the scaled Bradley-Terry loss.
    """
    difference = _common.reward_difference(chosen_rewards, rejected_rewards)
    labels = _labels(difference, strength=strength)
    return labels * _common.logistic_loss(difference)


def rao_kupper(
    chosen_rewards: PerPair,
    rejected_rewards: PerPair,
    tie: Labels,
    *,
    theta: Number = 3.0,
) -> PerPair:
    """Likelihood of wins and ties under the Rao-Kupper model (perception threshold).

        loss = -(1 - t) log P(win) - t log P(tie)
        P(win) = s(d - a),  P(tie) = (theta^2 - 1) s(d - a) s(-d - a)

    with d = r_w - r_l and the perception threshold a = log theta in nats.  Ties draw
    the rewards together.  Without ties, theta -> 1 gives `bradley_terry`.  With the
    default, equal answers tie half of the time: (theta - 1) / (theta + 1) = 1/2.

    Args:
      chosen_rewards: r_w, rewards of the chosen answers, nats; [*batch].  The order
        does not matter in a tie.
      rejected_rewards: r_l, rewards of the rejected answers, nats; [*batch].
      tie: t, 1 for a tie, 0 otherwise; values in between are the share of annotators
        who called a tie; [*batch].
      theta: how often answers tie, > 1.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a reward array is not floating point.
      ValueError: if shapes differ or a Python `theta` is not > 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import rao_kupper
      >>> loss = rao_kupper(jnp.zeros(2), jnp.zeros(2), jnp.array([0.0, 1.0]))
      >>> [f"{p:.4f}" for p in jnp.exp(-loss)]  # a win, a tie
      ['0.2500', '0.5000']

    References:
      Rao and Kupper, "Ties in Paired-Comparison Experiments: A Generalization of the
      Bradley-Terry Model", 1967.
      For policies, with this default: Chen et al., "On Extending Direct Preference
      Optimization to Accommodate Ties", 2024, arXiv:2409.17431, DPO-RK.
    """
    _common.between("theta", theta, 1.0, float("inf"))
    difference = _common.reward_difference(chosen_rewards, rejected_rewards)
    labels = _labels(difference, tie=tie)
    threshold = jnp.log(_common.per_pair("theta", theta, difference))
    # Python numbers are multiplied in float64, for precision near theta = 1.
    odds = (theta - 1) * (theta + 1)
    odds = jnp.log(_common.per_pair("theta", odds, difference))
    win = _common.logistic_loss(difference - threshold)
    # P(tie) is a constant times the product of win and loss probabilities.
    lost = _common.logistic_loss(-difference - threshold)
    return win + labels * (lost - odds)


def davidson(
    chosen_rewards: PerPair,
    rejected_rewards: PerPair,
    tie: Labels,
    *,
    nu: Number = 2.0,
) -> PerPair:
    """Likelihood of wins and ties under the Davidson model (ties keep the win odds).

        loss = -(1 - t) log P(win) - t log P(tie)
        P(win) : P(loss) : P(tie) = exp(d) : 1 : nu exp(d / 2)

    with d = r_w - r_l: the weight of a tie is nu times the geometric mean of the other
    two.  Ties draw the rewards together.  Without ties, nu -> 0 gives `bradley_terry`.
    With the default, equal answers tie half of the time: nu / (2 + nu) = 1/2.

    Args:
      chosen_rewards: r_w, rewards of the chosen answers, nats; [*batch].  The order
        does not matter in a tie.
      rejected_rewards: r_l, rewards of the rejected answers, nats; [*batch].
      tie: t, 1 for a tie, 0 otherwise; values in between are the share of annotators
        who called a tie; [*batch].
      nu: how often answers tie, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a reward array is not floating point.
      ValueError: if shapes differ or a Python `nu` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import davidson
      >>> loss = davidson(jnp.zeros(2), jnp.zeros(2), jnp.array([0.0, 1.0]))
      >>> [f"{p:.4f}" for p in jnp.exp(-loss)]  # a win, a tie
      ['0.2500', '0.5000']

    References:
      Davidson, "On Extending the Bradley-Terry Model to Accommodate Ties in Paired
      Comparison Experiments", 1970.
      For policies, with this default (there nu is written 2 nu_D, nu_D = 1): Chen et
      al., "On Extending Direct Preference Optimization to Accommodate Ties", 2024,
      arXiv:2409.17431, DPO-D.
    """
    _common.positive("nu", nu)
    difference = _common.reward_difference(chosen_rewards, rejected_rewards)
    labels = _labels(difference, tie=tie)
    weight = jnp.log(_common.per_pair("nu", nu, difference))
    half = 0.5 * difference
    win = jnp.logaddexp(_common.logistic_loss(difference), weight - half)
    return win + labels * (half - weight)


def reward_regression(rewards: PerPair, targets: Labels) -> PerPair:
    """Squared error of a predicted rating.

        loss = (r - target)^2

    The last axis may hold several predicted attributes.  To train on ratings and
    preferences together, add `bradley_terry` of the same rewards.

    Args:
      rewards: predicted ratings; [*batch].
      targets: annotated ratings in the same unit, integer or float; [*batch].

    Returns:
      One loss per answer (and attribute) in the rating's unit squared, [*batch], at
      least float32; >= 0.

    Raises:
      TypeError: if `rewards` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import reward_regression
      >>> print(reward_regression(jnp.array([3.5, 1.0]), jnp.array([4, 1])))
      [0.25 0.  ]

    References:
      Wang et al., "HelpSteer2-Preference: Complementing Ratings with Preferences",
      2024, arXiv:2410.01257, the regression reward models.
    """
    (rewards,) = _common.promoted(rewards=rewards)
    _common.same_shape(rewards=rewards, targets=targets)
    return jnp.square(rewards - jnp.asarray(targets, rewards.dtype))


def attribute_regression(attributes: Attributes, ratings: Attributes) -> PerPair:
    """Squared error of an answer's predicted ratings, averaged over its attributes.

        loss = mean over the rated attributes a of (r_a - rating_a)^2

    A rating of NaN is missing and left out.  Without any, the loss is 0.  With one
    attribute, it is `reward_regression`.

    Args:
      attributes: r_a, predicted ratings; [*batch, attributes].
      ratings: annotated ratings in the same unit; NaN where there is none;
        [*batch, attributes].

    Returns:
      One loss per answer in the ratings' unit squared, [*batch], at least float32;
      >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import attribute_regression
      >>> rated = jnp.array([4.0, jnp.nan, 1.0])
      >>> print(attribute_regression(jnp.array([3.0, 9.0, 1.5]), rated))
      0.625

    References:
      Wang et al., "HelpSteer2: Open-Source Dataset for Training Top-Performing Reward
      Models", 2024, arXiv:2406.08673, the regression reward models.
    """
    found, rated = _common.promoted(attributes=attributes, ratings=ratings)
    there = ~jnp.isnan(rated)
    squares = jnp.square(found - jnp.where(there, rated, found))
    return jnp.sum(squares, axis=-1) / jnp.maximum(jnp.sum(there, axis=-1), 1)


def center_rewards(chosen_rewards: PerPair, rejected_rewards: PerPair) -> PerPair:
    """A penalty that fixes the constant that comparisons do not determine.

        loss = (r_w + r_l)^2

    Add it with a small weight: `bradley_terry(w, l) + 0.01 * center_rewards(w, l)` (TRL
    recommends 0.01).  Bradley-Terry depends only on differences, and this term is
    smallest if the rewards of a pair have mean 0.

    Args:
      chosen_rewards: r_w, rewards of the chosen answers; [*batch].
      rejected_rewards: r_l, rewards of the rejected answers; [*batch].

    Returns:
      One loss per pair in the rewards' unit squared, [*batch], at least float32;
      >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import center_rewards
      >>> print(center_rewards(jnp.array([2.0, 3.0]), jnp.array([-2.0, 1.0])))
      [ 0. 16.]

    References:
      Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not
      Eliminate Reward Hacking", 2023, arXiv:2312.09244, Eq. 2.
      trl/trainer/reward_trainer.py, `center_rewards_coefficient`.
    """
    chosen, rejected = _common.promoted(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    return jnp.square(chosen + rejected)


def _labels(like: jax.Array, **labels) -> jax.Array:
    """One array of annotations in the dtype of `like`, of the same shape."""
    _common.same_shape(rewards=like, **labels)
    (values,) = labels.values()
    return jnp.asarray(values, like.dtype)
