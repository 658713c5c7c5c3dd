"""An online estimate of the flip rate from the recent margins of a model in training.

Each batch is scored before the model trains on it.  So in the first pass over the data,
the margins are those of a model that has not seen the labels.  The margins are binned
by size and by whether they agree with the label, with decaying weights.  The counts
give a posterior over the flip rate e and the temperature T of the margins (see
`jaxpref.noise.calibration`):

    P(e, T | counts)  ~  prior(e) prior(T) product of  (1 - e) s(z / T) + e s(-z / T)

The temperature is essential: a policy in training is overconfident, and without T its
confident errors would count as flipped labels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxpref.losses._common import Scalar
from jaxpref.noise import _common
from jaxpref.noise.rate import WIDEST

__all__ = ["RunningRate", "count", "no_counts", "posterior"]

SMALLEST, OCTAVES, PER_OCTAVE = -7, 14, 8
"""Bins of margin sizes from 2^-7 to 2^7, with edges a factor of 2^(1/8) apart."""
BINS = OCTAVES * PER_OCTAVE
RATES = 199
"""Flip rates on the grid, evenly spaced in (0, 1/2); the middle one is 1/4."""
TEMPERATURE_SPREAD = 2.0
"""Prior standard deviation of log2 T: two of three models are calibrated within a
factor of 4."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningRate:
    """A posterior of the flip rate and the temperature."""

    rate: Float[Array, ""]
    """The most likely e, marginalized over T; 1/4 if nothing is known."""
    lower: Float[Array, ""]
    """Lower end of the credible interval of e."""
    upper: Float[Array, ""]
    """Upper end of the credible interval of e."""
    temperature: Float[Array, ""]
    """2 to the posterior mean of log2 T."""
    identified: Bool[Array, ""]
    """Whether the interval is short enough; if not, report the interval, not `rate`."""


def no_counts(dtype: DTypeLike = jnp.float32) -> Float[Array, "bins 2"]:
    """The counts before the first batch: zeros."""
    return jnp.zeros((BINS, 2), dtype)


def count(
    counts: Float[Array, "bins 2"],
    margin_logits: Float[Array, " *batch"],
    *,
    memory: Scalar = float("inf"),
    where: Bool[Array, " *batch"] | None = None,
) -> Float[Array, "bins 2"]:
    """Adds a batch of margins to the counts of agreeing and disagreeing labels.

        counts <- exp(-labels of the batch / memory) counts + counts of the batch

    Args:
      counts: from `no_counts` or an earlier batch; column 0 for labels the model agrees
        with, column 1 for the others.
      margin_logits: z, nats, positive where the model agrees with the label; [*batch],
        of the global batch, regardless of its sharding.
      memory: number of labels after which an old one's weight is 1/e;
        infinity for no decay.
      where: which labels are real, [*batch]; None if all are.  The other labels are
        ignored, even if they hold NaN.

    Returns:
      The new counts; all of them NaN if a real label's margin is NaN and was traced.

    Raises:
      ValueError: if a real label's margin is NaN.
    """
    z = _common.floating(margin_logits)
    where = jnp.ones(z.shape, bool) if where is None else where
    unknown = jnp.sum(jnp.isnan(z) & where)
    if not isinstance(unknown, Tracer) and unknown:
        raise ValueError(f"Expected margins without NaN, got {unknown} NaN.")
    z = jax.lax.stop_gradient(_common.finite(jnp.where(where, z, 0)))
    size = jnp.log2(jnp.maximum(jnp.abs(z), 2.0**SMALLEST)) - SMALLEST
    bins = jnp.clip(size * PER_OCTAVE, 0, BINS - 1).astype(jnp.int32)
    # Uses a comparison, because a scatter along a sharded axis has no sharding rule.
    own = (bins[..., None] == jnp.arange(BINS)) & where[..., None]
    agrees = jnp.where(z == 0, 0.5, (z > 0).astype(z.dtype))[..., None]
    batch = tuple(range(z.ndim))
    of = lambda share: jnp.sum(jnp.where(own, share, 0), axis=batch)
    new = jnp.stack([of(agrees), of(1 - agrees)], axis=1)
    decay = jnp.exp(-jnp.sum(where) / jnp.asarray(memory, counts.dtype))
    # NaN agrees with no label and disagrees with none.
    new = jnp.where(unknown > 0, jnp.nan, new)
    return decay * counts + new.astype(counts.dtype)


def posterior(counts: Float[Array, "bins 2"], *, level: Scalar = 0.95) -> RunningRate:
    """The posterior of the flip rate and the temperature given the counts.

    Computed on a grid of `RATES` rates, with a Beta(2, 2) prior on 2e, and of
    temperatures from 2^-6 to 2^6, with a log-normal prior around 1.  The rate is the
    mode of its posterior, not the mean: if there are many flips, the posterior has a
    long tail toward low rates that shifts the mean.

    Args:
      counts: from `count`.
      level: posterior probability of the equal-tailed interval.

    Returns:
      `RunningRate`; NaN and not identified if a count is NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import running
      >>> z = jnp.array([8.0, 8.0, 8.0, -8.0] * 300 + [2.0, 2.0, -2.0] * 300)
      >>> found = running.posterior(running.count(running.no_counts(), z))
      >>> print(f"{found.rate:.2f} in {found.lower:.2f} to {found.upper:.2f}")
      0.25 in 0.22 to 0.28
    """
    dtype = counts.dtype
    middle = jnp.arange(BINS, dtype=dtype) + 0.5
    sizes = jnp.exp2(middle / PER_OCTAVE + SMALLEST)
    rates = (jnp.arange(RATES, dtype=dtype) + 0.5) / (2 * RATES)
    prior = jnp.log(2 * rates) + jnp.log1p(-2 * rates)
    steps = jnp.linspace(-6, 6, 49, dtype=dtype)  # log2 of the temperature

    def of_temperature(step):
        lean = jnp.tanh(sizes / jnp.exp2(step) / 2) * (1 - 2 * rates[:, None])
        # Relative to a fair coin, for precision in float32.  Matrix products, because
        # XLA on CPU (jax 0.10 to 0.12) miscomputes the fused sums.
        dot = functools.partial(jnp.matmul, precision="highest")
        gains = dot(jnp.log1p(lean), counts[:, 0]) + dot(jnp.log1p(-lean), counts[:, 1])
        return gains + prior - (step / TEMPERATURE_SPREAD) ** 2 / 2

    logs = jax.lax.map(of_temperature, steps)  # [temperatures, rates]
    mass = jnp.exp(logs - jnp.max(logs))
    mass /= jnp.sum(mass)
    of_rates = jnp.sum(mass, axis=0)
    below = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(of_rates)])
    edges = jnp.linspace(0, 0.5, RATES + 1, dtype=dtype)
    tail = (1 - jnp.asarray(level, dtype)) / 2
    lower, upper = jnp.interp(jnp.stack([tail, 1 - tail]), below, edges)
    return RunningRate(
        rate=rates[jnp.argmax(of_rates)] + 0 * of_rates[0],  # NaN if a count is NaN
        lower=lower,
        upper=upper,
        temperature=jnp.exp2(jnp.sum(mass * steps[:, None])),
        identified=upper - lower < WIDEST,
    )
