"""The equations of merging: one tensor from the same tensor of several models.

Pure numpy functions.  Tensors may have any floating-point dtype; they are converted to
float32 one at a time, sums are in float32, and so are results.  A tensor that several
models share is an iterable, which is consumed one tensor at a time, so that only one of
them has to be in memory.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

COLLINEAR = 0.9995
"""Above this absolute cosine, `slerp` interpolates linearly."""


def weighted_mean(
    tensors: Iterable[Float[np.ndarray, "..."]], weights: Sequence[float]
) -> Float[np.ndarray, "..."]:
    """The weighted mean of the same tensor of several models.

        theta = sum_i w_i theta_i / sum_i w_i

    Equal weights give a uniform soup.  Weights may be negative, which extrapolates.

    Args:
      tensors: theta_i, all of one shape [...].
      weights: w_i, in the same order.

    Returns:
      theta, float32 [...].

    Raises:
      ValueError: if the weights sum to 0, or there are not as many as tensors.

    References:
      Wortsman et al., "Model soups", arXiv:2203.05482 (equal weights).
    """
    shares = normalized(weights)
    total: np.ndarray | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        term = tensor.astype(np.float32)
        term *= np.float32(share)
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None  # `normalized` refuses an empty sequence
    return total


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights divided by their sum.

    Raises:
      ValueError: if they sum to 0, or to less than the rounding of their sum.
    """
    total = math.fsum(weights)
    if abs(total) <= 1e-6 * math.fsum(map(abs, weights)):
        raise ValueError(f"the weights {list(weights)} sum to 0")
    return tuple(weight / total for weight in weights)


def slerp(
    start: Float[np.ndarray, "..."], end: Float[np.ndarray, "..."], t: float
) -> Float[np.ndarray, "..."]:
    """Spherical linear interpolation from one tensor to another.

        theta = [sin((1 - t) phi) theta_0 + sin(t phi) theta_1] / sin(phi)
        cos(phi) = <theta_0, theta_1> / (|theta_0| |theta_1|)

    Each tensor counts as one vector.  If |cos(phi)| is above `COLLINEAR`, or a tensor
    is 0, the result is (1 - t) theta_0 + t theta_1.  At a cosine of `COLLINEAR` and for
    t in [0, 1], the two formulas differ by at most 1.3e-4 of the larger norm; opposite
    directions have no shortest arc.  mergekit has the same limit.

    Args:
      start: theta_0, [...].
      end: theta_1, of the same shape.
      t: the position between them: 0 gives `start` and 1 gives `end`.

    Returns:
      theta, float32 [...].

    References:
      Shoemake, "Animating rotation with quaternion curves", 1985.
    """
    first, second = start.astype(np.float32), end.astype(np.float32)
    norms = math.sqrt(_inner(first, first)) * math.sqrt(_inner(second, second))
    cosine = _inner(first, second) / norms if norms > 0 else 1.0
    shares = 1 - t, t
    if abs(cosine) <= COLLINEAR:
        angle = math.acos(cosine)
        shares = tuple(math.sin(share * angle) / math.sin(angle) for share in shares)
    first *= np.float32(shares[0])
    second *= np.float32(shares[1])
    return np.add(first, second, out=first)


def add_task_vectors(
    base: Float[np.ndarray, "..."],
    tensors: Iterable[Float[np.ndarray, "..."]],
    scales: Sequence[float],
) -> Float[np.ndarray, "..."]:
    """Adds scaled task vectors: what fine-tuning has changed in each model.

        theta = theta_base + sum_i s_i (theta_i - theta_base)

    A scale above 1 extrapolates.  With the weights before alignment as the base, one
    aligned model, and s = 1 + alpha, this is ExPO,
    theta = theta_1 + alpha (theta_1 - theta_0).  A negative scale takes away what was
    learned.

    Args:
      base: theta_base, [...].
      tensors: theta_i, all of the same shape.
      scales: s_i, in the same order.

    Returns:
      theta, float32 [...].

    Raises:
      ValueError: if there are not as many scales as tensors.

    References:
      Ilharco et al., "Editing models with task arithmetic", arXiv:2212.04089; Zheng et
      al., "Model extrapolation expedites alignment", arXiv:2404.16792 (ExPO).
    """
    origin = base.astype(np.float32)
    total = origin.copy()
    for tensor, scale in zip(tensors, scales, strict=True):
        vector = tensor.astype(np.float32)
        vector -= origin
        vector *= np.float32(scale)
        total += vector
    return total


def _inner(one: np.ndarray, other: np.ndarray) -> float:
    """The inner product of two tensors as vectors, summed in float64."""
    product = np.einsum("i,i->", one.ravel(), other.ravel(), dtype=np.float64)
    return float(product)
