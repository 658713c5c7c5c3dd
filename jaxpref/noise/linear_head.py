"""The posterior of a reward model's linear head, given the features of its pairs.

With features h(x, y) of a fixed backbone, a Bradley-Terry model is a logistic
regression on the differences d = h(x, y_w) - h(x, y_l) without an intercept:

    P(label) = s(d . w),    w ~ Normal(0, I / prior_precision)

So its posterior can be approximated by a normal distribution around the trained head
(Laplace), or by heads that are fitted to resampled pairs (bootstrap).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float, Key, UInt32

from jaxpref.losses import _common
from jaxpref.losses._common import Scalar
from jaxpref.noise._common import floating

__all__ = [
    "HeadPosterior",
    "evidence_precision",
    "expected_probability",
    "fit_head",
    "laplace",
    "resampled_heads",
]

Differences = Float[Array, "pairs D"]
"""Features of the chosen answers minus those of the rejected ones."""
RandomKey = Key[Array, ""] | UInt32[Array, "2"]

ROUNDS = 100
"""Fixed-point iterations of the prior precision."""
STEPS = 30
"""Newton steps of a fitted head."""
SHORTEST = 12
"""A Newton step is halved at most this often."""
LARGEST, SMALLEST = 1e8, 1e-8
"""The range of prior precisions."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadPosterior:
    """A normal distribution of the head's weights."""

    mean: Float[Array, " D"]
    """The trained head."""
    covariance: Float[Array, "D D"]
    """Inverse of the prior precision plus the Fisher information of the pairs."""
    prior_precision: Float[Array, ""]
    """Inverse variance of each weight before any pair."""

    def variance(self, features: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """The variance of rewards features . w, or of margins of feature differences.

        Rewards are determined up to a constant per prompt only: use differences, or
        features minus those of a typical answer.
        """
        return jnp.einsum("...d,de,...e->...", features, self.covariance, features)


def laplace(
    differences: Differences,
    head: Float[Array, " D"],
    *,
    prior_precision: Scalar | None = None,
) -> HeadPosterior:
    """The posterior of the last layer by Laplace's approximation.

        covariance = (prior_precision I + sum_i p_i (1 - p_i) d_i d_i^T)^-1
        p_i = s(d_i . head)

    Args:
      differences: d of the pairs that the model was trained on, in any order.
      head: the trained weights.
      prior_precision: > 0; by default, `evidence_precision`.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit, or a Python `prior_precision` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise.linear_head import laplace
      >>> pairs = jnp.array([[1.0, 0.0]] * 12)  # only the first feature was ever varied
      >>> found = laplace(pairs, jnp.zeros(2), prior_precision=1.0)
      >>> print(found.variance(jnp.eye(2)))
      [0.25 1.  ]

    References:
      MacKay, "The Evidence Framework Applied to Classification Networks", 1992, Neural
      Computation 4(5).
      Daxberger et al., "Laplace Redux", 2021, arXiv:2106.14806, the last layer.
      Yang et al., "Bayesian Reward Models for LLM Alignment", 2024, arXiv:2402.13210.
    """
    differences, head = _checked(differences, head)
    if prior_precision is None:
        prior_precision = evidence_precision(differences, head)
    _common.positive("prior_precision", prior_precision)
    precision = jnp.asarray(prior_precision, head.dtype)
    information = _information(differences, head, jnp.ones(len(differences)))
    identity = jnp.eye(head.size, dtype=head.dtype)
    factor = jax.scipy.linalg.cho_factor(information + precision * identity)
    covariance = jax.scipy.linalg.cho_solve(factor, identity)
    return HeadPosterior(head, covariance, precision)


def evidence_precision(
    differences: Differences, head: Float[Array, " D"]
) -> Float[Array, ""]:
    """The prior precision under which the pairs are most likely.

        out = gamma / |head|^2,    gamma = sum_d e_d / (e_d + out)

    with the eigenvalues e of the Fisher information: the stationary point of the
    Laplace approximation of the marginal likelihood.  Gamma is the number of directions
    of the head that the pairs determine.  Between 1e-8 and 1e8.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit.

    References:
      MacKay 1992, as for `laplace`.
    """
    differences, head = _checked(differences, head)
    information = _information(differences, head, jnp.ones(len(differences)))
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(information), 0)
    size = jnp.maximum(jnp.sum(head**2), jnp.finfo(head.dtype).tiny)

    def better(_, precision):
        gamma = jnp.sum(eigenvalues / (eigenvalues + precision))
        return jnp.clip(gamma / size, SMALLEST, LARGEST)

    return jax.lax.fori_loop(0, ROUNDS, better, jnp.ones((), head.dtype))


def fit_head(
    differences: Differences,
    weights: Float[Array, " pairs"],
    *,
    prior_precision: Scalar,
) -> Float[Array, " D"]:
    """The most probable head, given weighted pairs.

        out = argmin_w  -sum_i weights_i log s(d_i . w) + prior_precision / 2 |w|^2

    By Newton's method with halved steps; the problem is convex.

    Args:
      differences: d of the pairs.
      weights: how often each pair counts, >= 0.
      prior_precision: > 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit, or a Python `prior_precision` is not > 0.
    """
    differences, weights = map(floating, (differences, weights))
    if differences.ndim != 2 or weights.shape != differences.shape[:1]:
        raise ValueError(
            f"Expected differences [pairs, D] and weights [pairs], got "
            f"{differences.shape} and {weights.shape}."
        )
    _common.positive("prior_precision", prior_precision)
    return _fit_head(differences, weights, prior_precision)


@jax.jit
def _fit_head(differences, weights, precision):
    identity = jnp.eye(differences.shape[1], dtype=differences.dtype)
    sizes = 0.5 ** jnp.arange(SHORTEST + 1, dtype=differences.dtype)
    sizes = jnp.append(sizes, 0)[:, None]

    def newton(_, head):
        margins = differences @ head
        gradient = precision * head - (weights * sigmoid(-margins)) @ differences
        hessian = _information(differences, head, weights)
        hessian += precision * identity
        step = jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
        moved = margins[None] - sizes * (differences @ step)[None]
        heads = head[None] - sizes * step[None]
        loss = -log_sigmoid(moved) @ weights + precision / 2 * jnp.sum(heads**2, 1)
        return heads[jnp.argmin(loss)]

    start = jnp.zeros(differences.shape[1], differences.dtype)
    return jax.lax.fori_loop(0, STEPS, newton, start)


def resampled_heads(
    differences: Differences,
    key: RandomKey,
    *,
    members: int,
    prior_precision: Scalar,
) -> Float[Array, "members D"]:
    """An ensemble of heads, each fitted to pairs drawn with replacement.

    Args:
      differences: d of the pairs that the model was trained on.
      key: a JAX random key.
      members: number of heads, >= 1.
      prior_precision: see `fit_head`.

    Raises:
      TypeError: if the differences are not floating point.
      ValueError: if an argument is out of range.

    References:
      Lakshminarayanan et al., deep ensembles, 2016, arXiv:1612.01474; Osband et al.,
      "Deep Exploration via Bootstrapped DQN", 2016, arXiv:1602.04621: heads on one
      network.
    """
    if members < 1:
        raise ValueError(f"Expected members >= 1, got {members}.")
    _common.positive("prior_precision", prior_precision)
    keys = jax.random.split(key, members)
    return _resampled_heads(floating(differences), keys, prior_precision)


@jax.jit
def _resampled_heads(differences, keys, precision):
    count = len(differences)

    def member(key):
        drawn = jax.random.randint(key, (count,), 0, count)
        weights = jnp.zeros(count, differences.dtype).at[drawn].add(1)
        return _fit_head(differences, weights, precision)

    return jax.lax.map(member, keys)


def expected_probability(
    margins: Float[Array, "*batch"], variances: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The mean of s(m) over normal margins m.

        out = s(margin / sqrt(1 + pi variance / 8))

    to within 0.02, so an uncertain margin counts as a small one.

    References:
      MacKay 1992, as for `laplace`, Eq. 12.
    """
    margins, variances = map(floating, (margins, variances))
    return sigmoid(margins / jnp.sqrt(1 + jnp.pi * variances / 8))


def _information(differences, head, weights) -> jax.Array:
    """The sum of weight p (1 - p) d d^T over the pairs, [D, D]."""
    p = sigmoid(differences @ head)
    scale = (weights * p * (1 - p)).astype(head.dtype)
    return jnp.einsum("nd,n,ne->de", differences, scale, differences)


def _checked(differences, head) -> tuple[jax.Array, jax.Array]:
    differences, head = map(floating, (differences, head))
    if differences.ndim != 2 or head.shape != differences.shape[1:]:
        raise ValueError(
            f"Expected differences [pairs, D] and a head [D], got {differences.shape} "
            f"and {head.shape}."
        )
    return differences, head
