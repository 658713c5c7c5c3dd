"""Estimates of the flip rate, and whether the data identify it.

With z the margin of a label, positive where the model agrees with it, and e the flip
rate, the label has the marginal likelihood

    P(label) = (1 - e) s(z) + e s(-z) = (1 + (1 - 2e) tanh(z / 2)) / 2

Here e is a number in (0, 1/2): a rate above 1/2 is equivalent to a rate below 1/2 with
the sign of the model reversed, so the bound fixes the sign.  For fixed margins, the
likelihood is log-concave in e with a unique maximum.  Large margins determine e, and
margins of 0 do not inform it.  `jaxpref.noise.em` fits the same likelihood with one
rate per annotator and without the bound.

The margins must come from a model that was not trained on these labels, and must be
calibrated (`jaxpref.noise.calibration`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

from jaxpref.losses._common import Number, PerPair, is_number
from jaxpref.noise import _common
from jaxpref.sharding import replicated

WIDEST = 0.25
"""A rate is identified if its interval is shorter than this, half of (0, 1/2)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RateFit:
    """An estimated flip rate."""

    rate: Float[Array, ""]
    """The most likely e in (0, 1/2)."""
    lower: Float[Array, ""]
    """Lower end of the profile-likelihood interval."""
    upper: Float[Array, ""]
    """Upper end of the profile-likelihood interval."""
    identified: Bool[Array, ""]
    """Whether the interval is short enough; if not, report the interval, not `rate`."""
    log_likelihood: Float[Array, ""]
    """log P(labels) at `rate`, nats."""


def marginal_nll(margin_logits: PerPair, rate: Number) -> PerPair:
    """Negative log-likelihood of labels with a given flip rate.

        nll = -log((1 - e) s(z) + e s(-z))

    This is `forward_dpo` as a function of the margin.  Differentiable in both
    arguments, also at the ends of the rate's range:

        d nll / d e = (s(z) - s(-z)) exp(nll)

    Args:
      margin_logits: z, nats; [*batch].
      rate: e in [0, 1], one number or one per label; broadcasts.

    Returns:
      One number per label, at least float32; [*batch].

    References:
      RE-PO, 2025, arXiv:2509.24159, Eq. 3, with eta = 1 - e.
    """
    z = _common.floating(margin_logits)
    return _nll(z, jnp.asarray(rate, z.dtype))


def shrunken_nll(margin_logits: PerPair, shrinkage: Number) -> PerPair:
    """The loss of correct labels whose margins are c times as large as the model's.

        loss = (-log s(c z) - log 2) / c + log 2

    If flips shrink the margins that labels support by a factor c, a model that
    minimizes this learns the margins without flips, z.  At z = 0, the loss and its
    derivative, -1/2, do not depend on c; at large margins, the loss is negative.

    Args:
      margin_logits: z, nats; [*batch].
      shrinkage: c > 0, about 1 - 2e for small margins; broadcasts.

    Returns:
      One number per label, at least float32; [*batch].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import rate
      >>> print(rate.shrunken_nll(jnp.array([0.0, 2.0]), 0.5).round(3))
      [ 0.693 -0.067]

    References:
      Li and Duan, "Regression analysis under link violation", 1989: a wrong link, such
      as that of labels without flips, changes the scale of an estimate and not its
      direction, if the distribution of the features is elliptical.
    """
    z = _common.floating(margin_logits)
    c = jnp.asarray(shrinkage, z.dtype)
    return (jax.nn.softplus(-c * z) - jnp.log(2.0)) / c + jnp.log(2.0)


@jax.custom_jvp
def _nll(z: jax.Array, rate: jax.Array) -> jax.Array:
    # In log space nothing underflows; at e = 0 the second term is -inf and drops out.
    right = jnp.log1p(-rate) + jax.nn.log_sigmoid(z)
    wrong = jnp.log(rate) + jax.nn.log_sigmoid(-z)
    return -jnp.logaddexp(right, wrong)


@_nll.defjvp
def _nll_jvp(primals, tangents):
    # The gradient of log(e) at e = 0 is infinite, and infinity times 0 is NaN.
    (z, rate), (dz, drate) = primals, tangents
    nll = _nll(z, rate)
    right, wrong = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    by_z = -(1 - 2 * rate) * jnp.exp(right + wrong + nll)
    by_rate = _common.finite(jnp.exp(right + nll) - jnp.exp(wrong + nll))
    return nll, by_z * dz + by_rate * drate


def fit_rate(
    margin_logits: Float[Array, " labels"],
    *,
    where: Bool[Array, " labels"] | None = None,
    level: float = 0.95,
    widest: float = WIDEST,
) -> RateFit:
    """The maximum-likelihood flip rate for fixed margins, one for all annotators.

    The interval contains the rates whose log-likelihood is less than half the
    chi-squared quantile (one degree of freedom) below the maximum.  If it reaches 1/2,
    the data are compatible with uninformative labels.  A rate of 1/2 may also mean that
    most labels contradict the model.  Of 95% intervals, 0.925 to 0.970 covered rates of
    0.2 and 0.4 in 200 datasets each of 300 to 10,000 labels
    (`python -m tests.noise.simulations`, seeds 0 to 199).

    Args:
      margin_logits: z, nats; [labels].
      where: which labels are real; None if all are.
      level: coverage probability of the interval.
      widest: the rate is identified if its interval is shorter than this.

    Returns:
      `RateFit`; without labels, or if all margins are 0, the interval is (0, 1/2).

    Raises:
      ValueError: if shapes do not fit, or `level` is not in (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import rate
      >>> found = rate.fit_rate(jnp.array([6.0, 6.0, 6.0, -6.0] * 50))
      >>> print(f"{found.rate:.2f} in {found.lower:.2f} to {found.upper:.2f}")
      0.25 in 0.19 to 0.31
      >>> bool(rate.fit_rate(jnp.array([6.0, 6.0, -6.0])).identified)
      False
    """
    margins = _common.floating(margin_logits)
    if is_number(level) and not 0 < level < 1:
        raise ValueError(f"Expected level in (0, 1), got {level}.")
    where = jnp.ones(margins.shape, bool) if where is None else jnp.asarray(where, bool)
    if margins.ndim != 1 or where.shape != margins.shape:
        raise ValueError(
            "Expected margins [labels] and where of the same shape, got "
            f"{margins.shape} and {where.shape}."
        )
    return _fit_rate(margins, where, level, widest)


@jax.jit
def _fit_rate(margins, where, level, widest) -> RateFit:
    margins, where = replicated(margins), replicated(where)
    z = _common.finite(jnp.where(where, margins, 0))
    least = jnp.finfo(z.dtype).eps
    zero, half = jnp.asarray(least, z.dtype), jnp.asarray(0.5 - least, z.dtype)
    rises = lambda e: jnp.sum(_per_rate(z, e)) > 0
    # If nothing is known, return the middle; an end would look like an estimate.
    rate = jnp.where(jnp.any(z != 0), _common.bisect(rises, zero, half), 0.25)
    per_rate = _per_rate(z, rate)
    allowed = ndtri((1 + jnp.asarray(level, z.dtype)) / 2) ** 2 / 2

    def inside(e):
        # Relative to the maximum, each term is small, which preserves precision.
        gains = jnp.log(jnp.maximum(1 + (e - rate) * per_rate, 0))
        return jnp.sum(gains) > -allowed

    lower = _common.bisect(lambda e: ~inside(e), jnp.zeros_like(rate), rate)
    upper = _common.bisect(inside, rate, jnp.full_like(rate, 0.5))
    nll = marginal_nll(z, rate)
    return RateFit(
        rate=rate,
        lower=lower,
        upper=upper,
        identified=upper - lower < widest,
        log_likelihood=-jnp.sum(jnp.where(where, nll, 0)),
    )


def _per_rate(z: jax.Array, e: jax.Array) -> jax.Array:
    """Computes d log P(label) / d e = (s(-z) - s(z)) / P(label); 0 at z = 0."""
    return -jnp.tanh(z / 2) * jnp.exp(marginal_nll(z, e))
