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
import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses._common import PerPair, Rate, is_number
from jaxpref.noise import _common, em
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


def marginal_nll(margin_logits: PerPair, rate: Rate) -> PerPair:
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


def pooled_prior(
    evidence: Float[Array, " votes"],
    annotators: Int[Array, " votes"],
    *,
    num_annotators: int,
    where: Bool[Array, " votes"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The prior of a reliability, estimated from all annotators (empirical Bayes).

        (a, b) = argmax  sum over k of log int Beta(eta; a + 1, b + 1) L_k(eta) d eta
                         - 5/2 log(a + b + 2)

    L_k is the likelihood of the votes of k.  The second term is the usual vague prior
    on the size of a Beta.  A single annotator, or a few with few votes, say little
    about how annotators differ.  They get a prior of very few votes rather than one
    that repeats their own.  Pass (a, b) to `em.fit` and `em.estimate` as `prior`: it
    shrinks annotators with few votes toward the mean and hardly affects the others.

    Args:
      evidence: logit that each vote is right, ignoring its annotator: margins, or
        `em.Fit.evidence` if items have several votes; [votes].
      annotators: int index of the annotator; -1 if unknown, the last; [votes].
      num_annotators: K.
      where: which votes are real; None if all are.

    Returns:
      a and b, right and wrong votes; a + b at most 1000.

    References:
      Gelman et al., "Bayesian Data Analysis", 2013, 5.3, for the term in a + b.
    """
    evidence = _common.floating(evidence)
    where = jnp.ones(evidence.shape, bool) if where is None else where
    return _pooled_prior(evidence, annotators, where, num_annotators)


@functools.partial(jax.jit, static_argnames="num_annotators")
def _pooled_prior(evidence, annotators, where, num_annotators):
    evidence, annotators, where = map(
        replicated, (evidence, jnp.asarray(annotators), jnp.asarray(where))
    )
    dtype = evidence.dtype
    annotators = jnp.where(annotators < 0, num_annotators - 1, annotators)
    contrast = jnp.tanh(jnp.where(where, evidence, 0) / 2)
    points = 199
    grid = (jnp.arange(points, dtype=dtype) + 0.5) / points
    log_likelihoods = jax.lax.map(
        lambda eta: jax.ops.segment_sum(
            jnp.log1p((2 * eta - 1) * contrast), annotators, num_annotators
        ),
        grid,
    )
    likelihoods = jnp.exp(log_likelihoods - jnp.max(log_likelihoods, axis=0))

    def best(means, sizes):
        """The best combination of a mean a / (a + b) and a size log(a + b)."""
        mean, size = (x.reshape(-1, 1) for x in jnp.meshgrid(means, sizes))
        shape = jnp.exp(size) * (mean * jnp.log(grid) + (1 - mean) * jnp.log1p(-grid))
        density = jax.nn.softmax(shape, axis=-1)
        score = jnp.sum(jnp.log(density @ likelihoods), axis=-1)
        score = score - 2.5 * jnp.log(jnp.exp(size[:, 0]) + 2)
        chosen = jnp.argmax(score)
        return mean[chosen, 0], size[chosen, 0]

    low, high = jnp.log(jnp.asarray(0.1, dtype)), jnp.log(jnp.asarray(1000.0, dtype))
    mean, size = best(jnp.linspace(0.02, 0.98, 49), jnp.linspace(low, high, 25))
    for cell in (1.0, 1 / 8):
        near = jnp.linspace(-cell, cell, 17, dtype=dtype)
        mean, size = best(
            jnp.clip(mean + 0.02 * near, 0.005, 0.995),
            jnp.clip(size + (high - low) / 24 * near, low, high),
        )
    total = jnp.exp(size)
    return mean * total, (1 - mean) * total


def fit_rates(
    margin_logits: Float[Array, " votes"],
    annotators: Int[Array, " votes"],
    *,
    items: Int[Array, " votes"] | None = None,
    num_annotators: int,
    orientation: Int[Array, " votes"] | None = None,
    where: Bool[Array, " votes"] | None = None,
    level: float = 0.95,
) -> tuple[em.Fit, em.Prior]:
    """One rate per annotator, partially pooled: `em.fit` with `pooled_prior`.

    Alternates twice, because the evidence of other votes on an item depends on the
    reliabilities, and the prior depends on the evidence.

    Args:
      margin_logits: z, nats; [votes].
      annotators: int index of the annotator; -1 if unknown, the last; [votes].
      items: which votes judge the same pair; None if each has its own.
      num_annotators: K.
      orientation: as in `em.fit`.
      where: which votes are real; None if all are.
      level: probability of the credible intervals, which treat the prior as known.

    Returns:
      `em.Fit`, whose flip rates are 1 - reliability, and the prior (a, b).

    Raises:
      ValueError: as `em.fit`.
    """
    fit = functools.partial(
        em.fit,
        margin_logits,
        annotators,
        items=items,
        num_annotators=num_annotators,
        orientation=orientation,
        where=where,
        level=level,
    )
    prior, found = em.PRIOR, fit()
    for _ in range(2):
        prior = pooled_prior(
            found.evidence, annotators, num_annotators=num_annotators, where=where
        )
        found = fit(prior=prior)
    return found, prior


def _per_rate(z: jax.Array, e: jax.Array) -> jax.Array:
    """Computes d log P(label) / d e = (s(-z) - s(z)) / P(label); 0 at z = 0."""
    return -jnp.tanh(z / 2) * jnp.exp(marginal_nll(z, e))
