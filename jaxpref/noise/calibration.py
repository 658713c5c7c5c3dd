"""Temperature: margins that mean what they say, although labels may be wrong.

A model's margin m is calibrated if the first answer is better with probability s(m).
Models that have fitted their labels too well, or hardly at all, are not; `em` and
`rate` then put down to annotators what is the model's.  Dividing margins by a
temperature T mends the commonest error:

    z = m / T,    P(vote) = eta s(z) + (1 - eta) s(-z)

When can T and eta both be read off noisy votes?  The vote agrees with the model, at a
margin of size x = |m|, with probability

    q(x) = 1/2 + (eta - 1/2) tanh(x / 2T)

(q(x2) - 1/2) / (q(x1) - 1/2) = tanh(x2 / 2T) / tanh(x1 / 2T) for sizes x1 < x2 rises
strictly with T, from 1 to x2 / x1; so two sizes determine T, and then eta: the shape of
q, how it starts and where it levels off, tells the two apart.  But while all sizes are
small against T, q is a straight line of slope (eta - 1/2) / 2T: only that quotient is
known, whatever the number of votes.  With eta = 1/2, T is not known at all.  So look at
`identified`, and at the intervals.

How many labels that takes: median error of the rate (factor of the temperature), and in
how many of 200 data sets the rate was identified, z ~ N(0, sd^2)
(`python -m tests.noise.simulations`, seeds 0 to 199):

    labels   sd 2.5, e = 0.2       sd 2.5, e = 0.4       sd 1, e = 0.2
       300   0.049 (x1.47)  58 %   0.048 (x4.56)  12 %   0.148 (x1.73)   9 %
      1000   0.022 (x1.25)  94 %   0.031 (x2.06)  27 %   0.106 (x1.60)  10 %
      3000   0.013 (x1.12) 100 %   0.016 (x1.46)  61 %   0.054 (x1.27)  26 %
     10000   0.006 (x1.05) 100 %   0.008 (x1.21)  97 %   0.031 (x1.15)  79 %

With sd 1 and e = 0.4, 10,000 labels are too few (12 %).  Knowing the temperature, the
interval of the rate from 10,000 labels at e = 0.2 is 0.024 wide instead of 0.042 with
sd 2.5, and 0.044 instead of 0.214 with sd 1.

Fit on margins of held-out or cross-fitted pairs.  A margin that is wrong otherwise than
in scale (noise in m bends q as flips do) leaves a bias that no interval shows.
"""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

from jaxpref.noise import _common, em, rate
from jaxpref.sharding import replicated

FARTHEST = 10.0
"""Temperatures from 2^-10 to 2^10 are looked at, beyond which nobody's model is."""
WIDEST = 4.0
"""A temperature known to no better than this factor is not identified."""
CELLS = 41
"""Along each side of the grid of temperatures and rates."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TemperatureFit:
    """What the data say about the scale of the margins."""

    temperature: Float[Array, ""]
    """The most likely T: divide margins by it.  Above 1 where they were too sure."""
    lower: Float[Array, ""]
    """Where the profile-likelihood interval begins."""
    upper: Float[Array, ""]
    """Where it ends."""
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
      weights: w in [0, 1], the probability that the label is right: 1 or 0 where it is
        known, else a posterior that does not come from these margins (one that does
        confirms them); [pairs].
      where: which pairs are real; None if all are.
      level: probability with which the interval covers T, for outcomes 0 and 1.

    Returns:
      `TemperatureFit`; T at an end of [2^-10, 2^10] where outcomes are separated
      perfectly, or the margins are of no use.

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
    # With x = log2 T: the loss is convex in 1 / T, so its slope changes sign once.
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
    where: Bool[Array, " labels"] | None = None,
    level: float = 0.95,
) -> tuple[TemperatureFit, rate.RateFit]:
    """Temperature and flip rate together, by the marginal likelihood of noisy labels.

        T, e = argmax  sum of log((1 - e) s(m / T) + e s(-m / T)),    e in (0, 1/2)

    on a grid, zoomed in four times.  Each interval is a profile-likelihood interval: it
    allows for not knowing the other number.

    Args:
      margin_logits: m, nats, positive where the model agrees with the label; [labels].
      where: which labels are real; None if all are.
      level: probability with which each interval covers its number.

    Returns:
      `TemperatureFit` and `RateFit`.

    Raises:
      ValueError: if shapes do not fit, or `level` is not in (0, 1).
    """
    margins, where = _checked(margin_logits, where, level)
    return _fit_temperature_and_rate(margins, where, level)


@jax.jit
def _fit_temperature_and_rate(margins, where, level):
    margins, where = replicated(margins), replicated(where)
    m = _common.finite(jnp.where(where, margins, 0))
    dtype = m.dtype
    allowed = _allowed(level, dtype)
    tiny = jnp.finfo(dtype).tiny

    def label(x, e):
        p = jax.nn.sigmoid(jnp.exp2(-x) * m)
        return jnp.maximum(e + (1 - 2 * e) * p, tiny)

    def surface(xs, es, x, e):
        """Log-likelihoods relative to that at (x, e), label by label."""
        base = jnp.log(label(x, e))

        def row(x):
            gain = lambda e: jnp.sum(jnp.log(label(x, e)) - base)
            return jax.lax.map(gain, es)

        return jax.lax.map(row, xs)

    end = jnp.asarray(FARTHEST, dtype)
    x_box = (-end, end)
    e_box = (jnp.zeros((), dtype), jnp.asarray(0.5, dtype))
    x, e = jnp.zeros((), dtype), jnp.asarray(0.25, dtype)
    for _ in range(4):
        xs, es = _spread(x_box), _spread(e_box)
        gains = surface(xs, es, x, e)
        i, j = jnp.unravel_index(jnp.argmax(gains), gains.shape)
        x, e = xs[i], es[j]
        kept = gains > jnp.max(gains) - 4 * allowed
        x_box = _around(xs, kept.any(1), x_box)
        e_box = _around(es, kept.any(0), e_box)
    xs, es = _spread(x_box), _spread(e_box)
    gains = surface(xs, es, x, e)
    x_profile, e_profile = _ridge(gains), _ridge(gains.T)
    x_best, e_best = _top(xs, x_profile), _top(es, e_profile)
    known = jnp.any(m != 0)
    e_low, e_high = _ends(es, e_profile, allowed)
    found = rate.RateFit(
        rate=jnp.where(known, e_best, 0.25),
        lower=jnp.where(known, e_low, 0),
        upper=jnp.where(known, e_high, 0.5),
        identified=known & (e_high - e_low < rate.WIDEST),
        log_likelihood=jnp.sum(jnp.where(where, jnp.log(label(x_best, e_best)), 0)),
    )
    x_low, x_high = _ends(xs, x_profile, allowed)
    x_best = jnp.where(known, x_best, 0)
    ends = jnp.where(known, x_low, -end), jnp.where(known, x_high, end)
    return _temperature(x_best, *ends), found


def fit_temperature_and_reliability(
    margin_logits: Float[Array, " votes"],
    annotators,
    *,
    num_annotators: int,
    items=None,
    orientation=None,
    where: Bool[Array, " votes"] | None = None,
    prior=em.PRIOR,
    level: float = 0.95,
) -> tuple[TemperatureFit, em.Fit]:
    """Temperature and the reliabilities of all annotators together.

        T = argmax  of the log-likelihood of `em.fit` at margins m / T

    on a grid, zoomed in twice (63 fits in all).  Votes of several annotators on an item
    speak for the truth without the model, and identify T better than single votes do.
    With one vote an item and few votes an annotator it underestimates T, having as many
    reliabilities to choose as there are annotators: there fit T and the mean rate by
    `fit_temperature_and_rate`, which does not depend on who voted, and the annotators
    by `em.fit` at that temperature.

    Args:
      margin_logits: m, nats, positive where the model agrees with the vote; [votes].
      annotators: as in `em.fit`.
      num_annotators: as in `em.fit`.
      items: as in `em.fit`.
      orientation: as in `em.fit`.
      where: which votes are real; None if all are.
      prior: as in `em.fit`.
      level: probability of the intervals; those of the reliabilities take T as known.

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
        xs = _spread(box, 21)
        gains = profile(margins, xs)
        box = _around(xs, gains > jnp.max(gains) - 4 * allowed, box)
    gains = gains - jnp.max(gains)
    found = _temperature(_top(xs, gains), *_ends(xs, gains, allowed))
    return found, fit(margins / found.temperature)


def _temperature(x, lower, upper) -> TemperatureFit:
    """Of logarithms to the base 2."""
    return TemperatureFit(
        temperature=jnp.exp2(x),
        lower=jnp.exp2(lower),
        upper=jnp.exp2(upper),
        identified=jnp.exp2(upper - lower) < WIDEST,
    )


def _allowed(level, dtype) -> jax.Array:
    """How far below its maximum a log-likelihood may be inside an interval."""
    return ndtri((1 + jnp.asarray(level, dtype)) / 2) ** 2 / 2


def _spread(box, cells: int = CELLS) -> jax.Array:
    """Evenly spaced values from one end of a box to the other."""
    return box[0] + jnp.linspace(0, 1, cells, dtype=box[0].dtype) * (box[1] - box[0])


def _around(values, kept, box):
    """The part of an axis that holds what is kept, and a cell more on each side."""
    cell = (box[1] - box[0]) / (values.size - 1)
    low = jnp.min(jnp.where(kept, values, jnp.inf)) - cell
    high = jnp.max(jnp.where(kept, values, -jnp.inf)) + cell
    return jnp.maximum(low, box[0]), jnp.minimum(high, box[1])


def _peak(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the parabola through the largest of a row has its top, and how high.

    The ridge of a likelihood may be narrower than a cell.
    """
    at = jnp.argmax(values)
    inner = jnp.clip(at, 1, values.size - 2)
    left, middle, right = (values[inner + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    usable = (at == inner) & (bend < 0) & jnp.isfinite(bend)
    bend = jnp.where(usable, bend, -1)
    slope = jnp.where(usable, (right - left) / 2, 0)
    return at - slope / bend, values[at] - slope**2 / (2 * bend)


def _ridge(gains: jax.Array) -> jax.Array:
    """Of each row the highest point."""
    return jax.vmap(lambda row: _peak(row)[1])(gains)


def _top(values: jax.Array, profile: jax.Array) -> jax.Array:
    """Where a profile over evenly spaced values is highest."""
    return values[0] + _peak(profile)[0] * (values[1] - values[0])


def _ends(values: jax.Array, profile: jax.Array, allowed):
    """The outermost values whose profile is less than `allowed` below its maximum."""
    over = profile - (_peak(profile)[1] - allowed)
    inside = over > 0
    first, last = jnp.argmax(inside), values.size - 1 - jnp.argmax(inside[::-1])

    def crossing(inner, outer):
        outer = jnp.clip(outer, 0, values.size - 1)
        share = over[inner] / jnp.where(inner == outer, 1, over[inner] - over[outer])
        share = jnp.where(jnp.isfinite(share), share, 0)
        return values[inner] + share * (values[outer] - values[inner])

    return crossing(first, first - 1), crossing(last, last + 1)


def _checked(margin_logits, where, level, **arrays):
    """Margins in at least float32, and the mask."""
    margins = _common.floating(margin_logits)
    if isinstance(level, numbers.Real) and not 0 < level < 1:
        raise ValueError(f"Expected level in (0, 1), got {level}.")
    where = jnp.ones(margins.shape, bool) if where is None else jnp.asarray(where, bool)
    for name, array in (arrays | {"where": where}).items():
        if margins.ndim != 1 or jnp.shape(array) != margins.shape:
            raise ValueError(
                f"Expected margins [pairs] and {name} of the same shape, got "
                f"{margins.shape} and {jnp.shape(array)}."
            )
    return margins, where
