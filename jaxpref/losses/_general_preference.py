"""Preferences that may be cyclic: scores of pairs instead of rewards of answers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses import _common
from jaxpref.losses._common import PerPair, Scalar

__all__ = ["general_preference", "skew_symmetric_score"]

Embeddings = Float[Array, "*batch embedding"]
"""One vector of even length per answer."""
Eigenscales = Float[Array, "*batch planes"] | None
"""One weight per plane (two coordinates of the embeddings); None if all are 1."""


def skew_symmetric_score(
    chosen_embeddings: Embeddings,
    rejected_embeddings: Embeddings,
    *,
    eigenscales: Eigenscales = None,
) -> PerPair:
    """A score of one embedded answer over another that allows cyclic preferences.

        score = sum over planes p of  c_p (w_2p l_2p+1 - w_2p+1 l_2p)

    Swapping the answers flips the sign, and an answer scores 0 against itself.  Three
    answers at angles of 120 degrees in one plane beat each other in a cycle, which no
    reward can represent.  With enough planes, it represents any skew-symmetric matrix
    of scores.

    Args:
      chosen_embeddings: w; [*batch, 2k].  The authors scale them to unit length.
      rejected_embeddings: l; [*batch, 2k].
      eigenscales: c >= 0, the weight of each plane for this prompt; [*batch, k]; None
        for equal weights.

    Returns:
      One score per pair, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or the embedding's length is not even.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import skew_symmetric_score
      >>> east, north = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> print(skew_symmetric_score(east, north), skew_symmetric_score(north, east))
      1.0 -1.0

    References:
      Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for
      Language Model Alignment", 2024, arXiv:2410.02197, the preference score.
      general-preference/general-preference-model, general_preference/models/loss.py.
    """
    return _score(chosen_embeddings, rejected_embeddings, eigenscales)


def general_preference(
    chosen_embeddings: Embeddings,
    rejected_embeddings: Embeddings,
    *,
    tau: Scalar = 0.1,
    eigenscales: Eigenscales = None,
) -> PerPair:
    """Bradley-Terry with a skew-symmetric score instead of a difference of rewards.

        loss = -log s(score / tau),    score = skew_symmetric_score

    Learns intransitive preferences.  Equal embeddings give log 2.

    Args:
      chosen_embeddings: embeddings of the chosen answers; [*batch, 2k].
      rejected_embeddings: embeddings of the rejected answers; [*batch, 2k].
      tau: temperature of the scores, > 0.
      eigenscales: see `skew_symmetric_score`; [*batch, k].

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, the embedding's length is not even, or a Python
        `tau` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import general_preference
      >>> east, north = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> print(f"{general_preference(east, north, tau=1.0):.4f}")
      0.3133

    References:
      Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for
      Language Model Alignment", 2024, arXiv:2410.02197, the general preference model.
      general-preference/general-preference-model, general_preference/models/loss.py.
    """
    _common.positive("tau", tau)
    score = _score(chosen_embeddings, rejected_embeddings, eigenscales)
    return _common.logistic_loss(score / _common.scalar("tau", tau, score))


def _score(chosen_embeddings, rejected_embeddings, eigenscales) -> jax.Array:
    """See `skew_symmetric_score`."""
    chosen, rejected = _common.promoted(
        chosen_embeddings=chosen_embeddings, rejected_embeddings=rejected_embeddings
    )
    if chosen.ndim < 1 or chosen.shape[-1] % 2:
        raise ValueError(
            f"Expected embeddings of an even length, got shape {chosen.shape}."
        )
    planes = (
        chosen[..., 0::2] * rejected[..., 1::2]
        - chosen[..., 1::2] * rejected[..., 0::2]
    )
    if eigenscales is not None:
        planes, scales = _common.promoted(planes=planes, eigenscales=eigenscales)
        planes = planes * scales
    return jnp.sum(planes, axis=-1)
