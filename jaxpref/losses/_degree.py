"""Losses of how much content an answer has lost: self-supervised degrees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses import _common

__all__ = ["degree_classification"]


def degree_classification(
    degree_logits: Float[Array, "*batch C"], degrees: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """SPO's self-supervised term: classify how much content an answer has lost.

        loss = -log softmax(z)[k]

    z are a head's logits for an answer from which key content was removed to degree k,
    0 for none.  It is added to a preference loss, with a small weight.

    Args:
      degree_logits: logits of the C degrees; [*batch, C].
      degrees: k, from 0 to C - 1; [*batch].  Others give the loss log sum exp(z).

    Returns:
      One loss per answer, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if `degree_logits` is not floating point or `degrees` not integer.
      ValueError: if the shapes do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import degree_classification
      >>> print(degree_classification(jnp.zeros((1, 4)), jnp.array([2])))
      [1.3862944]

    References:
      Li et al., "Self-supervised Preference Optimization: Enhance Your Language Model
      with Preference Degree Awareness", 2024, arXiv:2409.17791.
    """
    (z,) = _common.promoted(degree_logits=degree_logits)
    degrees = jnp.asarray(degrees)
    if not jnp.issubdtype(degrees.dtype, jnp.integer):
        raise TypeError(f"Expected degrees to be integer, got {degrees.dtype}.")
    _common.same_shape(degree_logits=z[..., 0], degrees=degrees)
    # Selected by comparison and not by a gather, which works with any sharding.
    own = jnp.arange(z.shape[-1]) == degrees[..., None]
    return jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(own, z, 0), axis=-1)
