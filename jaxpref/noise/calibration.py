"""Calibration of margins by a temperature when labels may be wrong.

A model's margin m is calibrated if the first answer is better with probability s(m).
Models that overfit or underfit their labels are not calibrated, and `em` and `rate`
then attribute the model's errors to the annotators.  Dividing margins by a temperature
T corrects the most common error:

    z = m / T,    P(vote) = eta s(z) + (1 - eta) s(-z)

When do noisy votes determine both T and eta?  At a margin of size x = |m|, the vote
agrees with the model with probability

    q(x) = 1/2 + (eta - 1/2) tanh(x / 2T)

For sizes x1 < x2, (q(x2) - 1/2) / (q(x1) - 1/2) = tanh(x2 / 2T) / tanh(x1 / 2T)
increases strictly with T, from 1 to x2 / x1.  So two sizes determine T, and then eta:
the initial slope of q and the level at which it saturates separate the two.  But if all
sizes are small compared to T, q is a straight line of slope (eta - 1/2) / 2T.  Then
only this quotient is determined, however many votes there are.  With eta = 1/2, T is
not determined at all.  So check `identified` and the intervals.

The number of labels needed: median error of the rate (factor of the temperature), and
in how many of 200 datasets the rate was identified, z ~ N(0, sd^2)
(`python -m tests.noise.simulations`, seeds 0 to 199):

    labels   sd 2.5, e = 0.2      sd 2.5, e = 0.4      sd 1, e = 0.2
       300   0.049 (x1.47)  58%   0.048 (x4.56)  12%   0.148 (x1.73)   9%
      1000   0.022 (x1.25)  94%   0.031 (x2.06)  27%   0.106 (x1.60)  10%
      3000   0.013 (x1.12) 100%   0.016 (x1.46)  61%   0.054 (x1.27)  26%
     10000   0.006 (x1.05) 100%   0.008 (x1.21)  97%   0.031 (x1.15)  79%

With sd 1 and e = 0.4, 10,000 labels are too few (12%).  If the temperature is known,
the interval of the rate from 10,000 labels at e = 0.2 is 0.024 wide instead of 0.042
with sd 2.5, and 0.044 instead of 0.214 with sd 1.

Fit on margins of held-out or cross-fitted pairs.  Errors of the margins other than
their scale cause a bias that no interval shows (noise in m bends q as flips do).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri, xlog1py, xlogy
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses._common import is_number
from jaxpref.noise import _common, _grid, em, rate
from jaxpref.sharding import replicated

FARTHEST = 10.0
"""log2 of the largest temperature considered; the smallest is its inverse."""
WIDEST = 4.0
"""A temperature is identified if its interval spans less than this factor."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TemperatureFit:
    """An estimated temperature."""

    temperature: Float[Array, ""]
    """The most likely T: divide margins by it.  Above 1 if they are overconfident."""
    lower: Float[Array, ""]
    """Lower end of the profile-likelihood interval."""
    upper: Float[Array, ""]
    """Upper end of the profile-likelihood interval."""
    identified: Bool[Array, ""]
    """Whether `upper` is less than four times `lower`."""


def fit_temperature(
    margin_logits: Float[Array, " pairs"],
    weights: Float[Array, " pairs"],
    *,
    where: Bool[Array, " pairs"] | None = None,
    level: float = 0.95,
) -> TemperatureFit:
    """Temperature for known outcomes, or for posteriors of them.

        T = argmin  sum of -w log s(m / T) - (1 - w) log s(-m / T)

    Args:
      margin_logits: m, nats, positive where the model agrees with the label; [pairs].
      weights: w in [0, 1], the probability that the label is right: 1 or 0 if known,
        otherwise a posterior that must not come from these margins (it would only
        confirm them); [pairs].
      where: which pairs are real; None if all are.
      level: probability with which the interval covers T, for outcomes 0 and 1.

    Returns:
      `TemperatureFit`; T is an end of [2^-10, 2^10] if the outcomes are perfectly
      separated or the margins carry no information.

    Raises:
      ValueError: if shapes do not fit, or `level` is not in (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import calibration
      >>> right = jnp.array([1.0, 1.0, 1.0, 0.0] * 50)  # three of four, so s(log 3)
      >>> found = calibration.fit_temperature(jnp.full(200, 4 * jnp.log(3)), right)
      >>> print(f"{found.temperature:.3f}")
      4.000

    References:
      Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599,
      temperature scaling.
    """
    margins, where = _checked(margin_logits, where, level, weights=weights)
    return _fit_temperature(margins, jnp.asarray(weights), where, level)


@jax.jit
def _fit_temperature(margins, weights, where, level) -> TemperatureFit:
    margins, weights, where = map(replicated, (margins, weights, where))
    m = _common.finite(jnp.where(where, margins, 0))
    w = jnp.where(where, weights, 0).astype(m.dtype)
    nll = lambda x: em.likelihood_loss(jnp.exp2(-x) * m, w)
    end = jnp.asarray(FARTHEST, m.dtype)
    # x = log2 T: the loss is convex in 1 / T, so its derivative changes sign once.
    cools = lambda x: jnp.sum((jax.nn.sigmoid(jnp.exp2(-x) * m) - w) * m) > 0
    best = _common.bisect(cools, -end, end)
    least = nll(best)
    allowed = _allowed(level, m.dtype)
    inside = lambda x: jnp.sum(nll(x) - least) < allowed
    lower = _common.bisect(lambda x: ~inside(x), -end, best)
    upper = _common.bisect(inside, best, end)
    return _temperature(best, lower, upper)


def fit_temperature_and_rate(
    margin_logits: Float[Array, " labels"],
    *,
    items: Int[Array, " labels"] | None = None,
    orientation: Int[Array, " labels"] | None = None,
    where: Bool[Array, " labels"] | None = None,
    level: float = 0.95,
) -> tuple[TemperatureFit, rate.RateFit]:
    """Temperature and flip rate together, by the marginal likelihood of noisy labels.

        T, e = argmax  sum of log((1 - e) s(m / T) + e s(-m / T)),    e in (0, 1/2)

    on a grid that is refined four times.  The intervals are profile-likelihood
    intervals: each accounts for the uncertainty of the other parameter.

    With several labels on an item, of which a prefer the first answer and b the second,
    and M the item's margin for the first answer, the item has the likelihood

        s(M / T) (1 - e)^a e^b + s(-M / T) (1 - e)^b e^a

    A rate of 1 - e with margins of the opposite sign has the same likelihood.  So the
    bound is an assumption: labels are right more often than wrong.

    Args:
      margin_logits: m, nats, positive where the model agrees with the label; [labels].
      items: which labels judge the same pair; any integers; None if each has its own.
      orientation: +1 or -1, which answer of its item a label prefers; None for the
        signs of the margins, as in `em.fit`.
      where: which labels are real; None if all are.
      level: coverage probability of each interval.

    Returns:
      `TemperatureFit` and `RateFit`.

    Raises:
      ValueError: if shapes do not fit, or `level` is not in (0, 1).
    """
    arrays = {} if orientation is None else {"orientation": orientation}
    arrays |= {} if items is None else {"items": items}
    margins, where = _checked(margin_logits, where, level, **arrays)
    return _fit_temperature_and_rate(margins, items, orientation, where, level)


def _of_labels(m):
    """The log-likelihood of each label, as a function of log2 T and e."""
    tiny = jnp.finfo(m.dtype).tiny

    def logs(x, e):
        p = jax.nn.sigmoid(jnp.exp2(-x) * m)
        return jnp.log(jnp.maximum(e + (1 - 2 * e) * p, tiny))

    return logs


def _of_items(m, items, orientation, where):
    """The same for items, each at its first label; 0 at the others."""
    sign = jnp.where(m < 0, -1, 1) if orientation is None else jnp.sign(orientation)
    sign, real = sign.astype(m.dtype), where.astype(m.dtype)
    _, ids = jnp.unique(items, return_inverse=True, size=m.size)
    on_item = lambda x: jax.ops.segment_sum(x, ids, m.size)[ids]
    first, second = (on_item(real * (sign == side)) for side in (1, -1))
    margin = on_item(real * sign * m) / jnp.maximum(first + second, 1)
    place = jnp.where(where, jnp.arange(m.size), m.size)
    judged = where & (jax.ops.segment_min(place, ids, m.size)[ids] == place)

    def logs(x, e):
        z = jnp.exp2(-x) * margin
        votes = lambda right, wrong: xlog1py(right, -e) + xlogy(wrong, e)
        of_item = jnp.logaddexp(
            jax.nn.log_sigmoid(z) + votes(first, second),
            jax.nn.log_sigmoid(-z) + votes(second, first),
        )
        return jnp.where(judged, of_item, 0)

    return logs, jnp.max(first + second) > 1


@jax.jit
def _fit_temperature_and_rate(margins, items, orientation, where, level):
    margins, items, orientation, where = jax.tree.map(
        lambda x: replicated(jnp.asarray(x)), (margins, items, orientation, where)
    )
    m = _common.finite(jnp.where(where, margins, 0))
    dtype = m.dtype
    allowed = _allowed(level, dtype)
    has_margins = jnp.any(m != 0)
    logs, known = _of_labels(m), has_margins
    if items is not None:
        logs, several = _of_items(m, items, orientation, where)
        known |= several

    def surface(xs, es, x, e):
        """Log-likelihoods relative to (x, e), subtracted label by label."""
        base = logs(x, e)

        def row(x):
            gain = lambda e: jnp.sum(logs(x, e) - base)
            return jax.lax.map(gain, es)

        return jax.lax.map(row, xs)

    end = jnp.asarray(FARTHEST, dtype)
    x_box = (-end, end)
    e_box = (jnp.zeros((), dtype), jnp.asarray(0.5, dtype))
    x, e = jnp.zeros((), dtype), jnp.asarray(0.25, dtype)
    for _ in range(4):
        xs, es = _grid.spread(x_box), _grid.spread(e_box)
        gains = surface(xs, es, x, e)
        i, j = jnp.unravel_index(jnp.argmax(gains), gains.shape)
        x, e = xs[i], es[j]
        plausible = gains > jnp.max(gains) - 4 * allowed
        x_box = _grid.around(xs, plausible.any(1), x_box)
        e_box = _grid.around(es, plausible.any(0), e_box)
    xs, es = _grid.spread(x_box), _grid.spread(e_box)
    gains = surface(xs, es, x, e)
    x_profile, e_profile = _grid.ridge(gains), _grid.ridge(gains.T)
    x_best, e_best = _grid.top(xs, x_profile), _grid.top(es, e_profile)
    e_low, e_high = _grid.ends(es, e_profile, allowed)
    found = rate.RateFit(
        rate=jnp.where(known, e_best, 0.25),
        lower=jnp.where(known, e_low, 0),
        upper=jnp.where(known, e_high, 0.5),
        identified=known & (e_high - e_low < rate.WIDEST),
        log_likelihood=jnp.sum(jnp.where(where, logs(x_best, e_best), 0)),
    )
    x_low, x_high = _grid.ends(xs, x_profile, allowed)
    x_best = jnp.where(has_margins, x_best, 0)
    ends = jnp.where(has_margins, x_low, -end), jnp.where(has_margins, x_high, end)
    return _temperature(x_best, *ends), found


def fit_temperature_and_reliability(
    margin_logits: Float[Array, " votes"],
    annotators: Int[Array, " votes"],
    *,
    num_annotators: int,
    items: Int[Array, " votes"] | None = None,
    orientation: Int[Array, " votes"] | None = None,
    where: Bool[Array, " votes"] | None = None,
    prior: em.Prior | None = em.PRIOR,
    level: float = 0.95,
) -> tuple[TemperatureFit, em.Fit]:
    """Temperature and the reliabilities of all annotators together.

        T = argmax  of the log-likelihood of `em.fit` at margins m / T

    on a grid that is refined twice (63 fits in total).  Several votes on an item are
    evidence about the truth independent of the model, and identify T better than single
    votes do.  With one vote per item and few votes per annotator, T is underestimated,
    because there are as many reliabilities as annotators.  In that case fit T and the
    mean rate by `fit_temperature_and_rate`, which does not depend on who voted, and
    then the annotators by `em.fit` at that temperature.

    Args:
      margin_logits: m, nats, positive where the model agrees with the vote; [votes].
      annotators: as in `em.fit`.
      num_annotators: as in `em.fit`.
      items: as in `em.fit`.
      orientation: as in `em.fit`.
      where: which votes are real; None if all are.
      prior: as in `em.fit`.
      level: probability of the intervals; those of the reliabilities treat T as known.

    Returns:
      `TemperatureFit`, and the `em.Fit` at that temperature.

    Raises:
      ValueError: as `em.fit`.
    """
    margins = _common.floating(margin_logits)
    fit = functools.partial(
        em.fit,
        annotators=annotators,
        items=items,
        num_annotators=num_annotators,
        orientation=orientation,
        where=where,
        prior=prior,
        level=level,
    )

    @jax.jit
    def profile(margins, xs):
        at = lambda x: fit(jnp.exp2(-x) * margins).log_likelihood
        return jax.lax.map(at, xs)

    allowed = _allowed(level, margins.dtype)
    end = jnp.asarray(FARTHEST, margins.dtype)
    box = -end, end
    for _ in range(3):
        xs = _grid.spread(box, 21)
        gains = profile(margins, xs)
        box = _grid.around(xs, gains > jnp.max(gains) - 4 * allowed, box)
    gains = gains - jnp.max(gains)
    found = _temperature(_grid.top(xs, gains), *_grid.ends(xs, gains, allowed))
    return found, fit(margins / found.temperature)


def _temperature(x, lower, upper) -> TemperatureFit:
    """Converts base-2 logarithms to a `TemperatureFit`."""
    return TemperatureFit(
        temperature=jnp.exp2(x),
        lower=jnp.exp2(lower),
        upper=jnp.exp2(upper),
        identified=jnp.exp2(upper - lower) < WIDEST,
    )


def _allowed(level, dtype) -> jax.Array:
    """How far below its maximum the log-likelihood is at the ends of an interval."""
    return ndtri((1 + jnp.asarray(level, dtype)) / 2) ** 2 / 2


def _checked(margin_logits, where, level, **arrays):
    """Checks the arguments; returns margins in at least float32, and the mask."""
    margins = _common.floating(margin_logits)
    if is_number(level) and not 0 < level < 1:
        raise ValueError(f"Expected level in (0, 1), got {level}.")
    where = jnp.ones(margins.shape, bool) if where is None else jnp.asarray(where, bool)
    for name, array in (arrays | {"where": where}).items():
        if margins.ndim != 1 or jnp.shape(array) != margins.shape:
            raise ValueError(
                f"Expected margins [pairs] and {name} of the same shape, got "
                f"{margins.shape} and {jnp.shape(array)}."
            )
    return margins, where
