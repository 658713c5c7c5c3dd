"""Collaborative reward modeling (CRM): two models review each other's training pairs.

A model that has overfitted a flipped label finds it easy and would select it again.
Another model, with different initial weights, has not overfitted the same labels.  So
each model trains on the pairs that the OTHER one finds easy: those with a large margin
r_w - r_l or, for two policies (CRM-DPO), a large implicit reward margin.  Two equal
models stay equal, so they must start from different weights or see different batches.

Select within shuffled batches (`peer_selection`).  If batches are sorted by margin
(`curriculum`), the last ones contain only wrong labels, and a fixed share of each would
be selected: then drop the hardest pairs of the epoch instead.  `jaxpref.objectives.crm`
leaves the batches shuffled, and the curriculum decides which of their pairs may be
selected.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses import _common
from jaxpref.losses._common import Mask, PerPair, Scalar
from jaxpref.sharding import replicated

__all__ = ["curriculum", "kept_share", "peer_selection"]


def kept_share(
    epoch: Scalar | Int[Array, ""], *, noise_rate: Scalar, ramp_epochs: Scalar = 3
) -> Float[Array, ""]:
    """The share of pairs to train on, from all to all but the flipped ones.

        out = 1 - noise_rate min(1, epoch / ramp_epochs)

    A model learns what most labels agree on before it memorizes exceptions.  So no pair
    is dropped before the margins are informative.

    Args:
      epoch: number of passes over the data so far, may be fractional or traced.
      noise_rate: share of wrong labels, in [0, 1): known, or estimated, for example as
        1 - the mean reliability from `jaxpref.noise.em`.
      ramp_epochs: number of epochs until the full share is dropped, > 0.

    Returns:
      A share in (0, 1], float32 or wider.

    Raises:
      ValueError: if a Python `noise_rate` is outside [0, 1), or `ramp_epochs` is not
        > 0, or `epoch` is < 0.

    Examples:
      >>> from jaxpref.noise.peer import kept_share
      >>> [f"{kept_share(epoch, noise_rate=0.3):.2f}" for epoch in range(5)]
      ['1.00', '0.90', '0.80', '0.70', '0.70']

    References:
      Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely
      Noisy Labels", 2018, arXiv:1804.06872, the schedule.
      Zhang et al., "Two Minds Better Than One: Collaborative Reward Modeling for LLM
      Alignment" (CRM), 2025, arXiv:2505.10597.
    """
    _common.not_negative("epoch", epoch)
    _common.positive("ramp_epochs", ramp_epochs)
    _common.fraction("noise_rate", noise_rate)
    if isinstance(noise_rate, (int, float)) and noise_rate == 1:
        raise ValueError("Expected noise_rate < 1, got 1: no pair would be left.")
    return 1 - jnp.asarray(noise_rate) * jnp.minimum(1.0, epoch / ramp_epochs)


def peer_selection(
    margins_one: PerPair, margins_two: PerPair, *, keep: Scalar, where: Mask = None
) -> tuple[Bool[Array, "*batch"], Bool[Array, "*batch"]]:
    """Selects the pairs that each of two models trains on: the other's easiest.

        for one = the round(keep n) largest of margins_two, of n real pairs
        for two = the round(keep n) largest of margins_one

    At least one pair is selected.  Among equal margins, the first pairs are selected.
    The batch is the global one and must be random; see the module's docstring.

    Args:
      margins_one: r_w - r_l of each pair under the first model, any unit; [*batch].
      margins_two: the same under the second model; [*batch].
      keep: share of the pairs to select, in (0, 1], for example from `kept_share`.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      For model one and for model two, which pairs to train on, [*batch]; false where
      not real.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `keep` is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.peer import peer_selection
      >>> one, two = jnp.array([3.0, 2.0, -1.0, 0.0]), jnp.array([-3.0, 2.0, 1.0, 0.0])
      >>> for_one, for_two = peer_selection(one, two, keep=0.5)
      >>> print(for_one, for_two)
      [False  True  True False] [ True  True False False]

    References:
      Zhang et al., "Two Minds Better Than One: Collaborative Reward Modeling for LLM
      Alignment" (CRM), 2025, arXiv:2505.10597, peer review.
      Han et al., "Co-teaching", 2018, arXiv:1804.06872.
    """
    _common.fraction("keep", keep)
    one, two = _common.promoted(margins_one=margins_one, margins_two=margins_two)
    where = _common.mask(where, one)
    count = _count(keep, where, one.dtype)

    def easiest(margins):
        place = jnp.argsort(_easy_to_hard(margins, where)).reshape(margins.shape)
        return where & (place < count)

    return easiest(two), easiest(one)


def curriculum(
    margins_one: PerPair, margins_two: PerPair, *, keep: Scalar, where: Mask = None
) -> tuple[Int[Array, " pairs"], Int[Array, ""]]:
    """Orders an epoch for both models from easy to hard, without the hardest pairs.

        order = pairs by margins_one + margins_two, largest first
        count = round(keep n) of n real pairs, at least one

    Train both models on order[:count], in this order, and drop nothing else.  The two
    margins should have the same scale, like those of two reward models trained in the
    same way.  Equal sums keep their order.

    Args:
      margins_one: r_w - r_l of each pair of the epoch under the first model; [*batch].
      margins_two: the same under the second model; [*batch].
      keep: share of the pairs to select, in (0, 1], for example from `kept_share`.
      where: which pairs are real, [*batch]; None if all are.  The other pairs are
        ignored, even if they hold NaN.

    Returns:
      Indices of all flattened pairs, int32 [N], with those not real at the end, and
      the number of pairs to train on, int32 [].

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `keep` is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.peer import curriculum
      >>> one, two = jnp.array([3.0, 2.0, -1.0, 0.0]), jnp.array([-3.0, 2.0, 1.5, -1.0])
      >>> order, count = curriculum(one, two, keep=0.75)
      >>> print(order[:count])
      [1 2 0]

    References:
      Zhang et al., "Two Minds Better Than One: Collaborative Reward Modeling for LLM
      Alignment" (CRM), 2025, arXiv:2505.10597, the curriculum.
    """
    _common.fraction("keep", keep)
    one, two = _common.promoted(margins_one=margins_one, margins_two=margins_two)
    where = _common.mask(where, one)
    return _easy_to_hard(one + two, where), _count(keep, where, one.dtype)


def _easy_to_hard(margins: jax.Array, where: jax.Array) -> jax.Array:
    """Flat indices: largest margin first, then NaN, then pairs that are not real."""
    flat = lambda x: replicated(x).reshape(-1)
    return jnp.lexsort((flat(-margins), flat(~where)))


def _count(keep, where: jax.Array, dtype) -> jax.Array:
    real = jnp.sum(where)
    count = jnp.round(real * jnp.asarray(keep, dtype)).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(count, 1), real)
