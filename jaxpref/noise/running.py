"""An online estimate of the flip rate from the margins of a model in training.

Each batch is scored before the model trains on it.  So in the first pass over the data,
the margins z are those of a model that has not seen the labels.  Their scale grows
during the pass, so they are divided by a running mean of |z|, and counted by size, by
agreement with the label, and by block, a sixteenth of the pass.  With u = |z| / mean:

    P(agree) = 1/2 + (1/2 - e) tanh(u^c / 2t)
    log2 t of a block ~ Normal(log2 t of the block before, s^2)

What identifies e?  Without an assumption on the link (P(agree) as a function of u),
only the bound e <= 1 - sup P(agree) holds: a model whose most certain margins are wrong
for a share e of the pairs produces the same agreements as flipped labels.  With the
link above, a block has three unknowns: its initial slope (1/2 - e) / 2t, the level
1 - e at which it saturates, and c, which sets how fast.  Blocks share e and c, so an
unknown t for each block costs little; but margins that are all small only determine the
slope.  The power c is 1 for margins that are calibrated up to their scale.  The prior
of log2 c has a standard deviation of 1/4, since a policy's margins are not: errors bend
the link.

The likelihood is integrated over t (a forward pass over the blocks), s, and c on a
grid, for each e.  As no maximum is searched for, there are no starting points, and no
local maxima.

Coverage of the 95% interval is 0.94 to 0.96 for calibrated margins with a standard
deviation of 1.5 whose scale drifts (1,000 datasets at each rate), and at least 0.90 for
heavier tails, and for policies with normal errors.  Two assumptions remain.  The shape
of the link: if the errors have heavier tails than the true margins, they count as
flips, and coverage is 0.  A scale that changes little within a block: if it varies by
15% between batches, a few flips seem to be there without any, and coverage of a rate of
0 is 0.67 (`python -m tests.noise.drift`; table in docs/noise.md).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.scipy.special import logsumexp, ndtri, xlog1py, xlogy
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxpref.losses._common import Scalar
from jaxpref.noise import _common, _grid
from jaxpref.noise.rate import WIDEST
from jaxpref.sharding import replicated

__all__ = [
    "Counts",
    "RunningRate",
    "bins_of",
    "count",
    "no_counts",
    "posterior",
    "sizes",
]

BLOCKS = 16
"""Blocks of the pass.  When all are in use, neighbors are merged, so that any number of
labels fills at least half of them."""
SHORTEST = 64
"""Labels of the first blocks; more if the first batch has more."""
SMALLEST, OCTAVES, PER_OCTAVE = -6, 9, 8
"""Bins of u from 2^-6 to 2^3, with edges a factor of 2^(1/8) apart."""
BINS = OCTAVES * PER_OCTAVE
SCALE_MEMORY = 256.0
"""Labels after which the weight of an old label in the mean of |z| is 1/e."""
LARGEST = 1e6
"""Margins are clipped to it, nats."""
RATES = 101
"""Flip rates on the grid, from 0 to 1/2."""
COLDEST, HOTTEST, TEMPERATURES = -3, 7, 81
"""The grid of log2 t."""
START_SPREAD = 2.0
"""The prior of log2 t in the first block is normal around 0 with this standard
deviation, with probability 1/2: two of three models have a mean calibrated margin of
1/4 to 4 nats."""
IGNORANT = 4.0
"""With probability 1/2 the prior is uniform above this value: the margins of a policy
that has learned nothing yet say nothing, at any flip rate."""
STEPS = (0.125, 0.5)
"""Standard deviations s, in octaves per block: a steady model, and one that learns."""
JUMP = 0.01
"""Probability that a block has any t, whatever that of the block before."""
POWERS = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Values of log2 c, with a prior Normal(0, `POWER_SPREAD`^2)."""
POWER_SPREAD = 0.25
SURE = 0.9
"""The rate is 0 if its posterior probability is above this, from a prior of 1/2."""
AGREEMENT = 0.99
"""The halves of the pass disagree if a likelihood-ratio test at this level rejects that
they have the same rate."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Labels counted by block of the pass, size of the margin, and agreement."""

    table: Float[Array, "blocks bins 2"]
    """Column 0 counts labels the model agrees with, column 1 the others."""
    labels: Float[Array, ""]
    """All labels so far."""
    block_length: Float[Array, ""]
    """Labels per block."""
    size_sum: Float[Array, ""]
    """Decaying sum of |z|."""
    size_weight: Float[Array, ""]
    """Decaying number of labels in `size_sum`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningRate:
    """An estimate of the flip rate and of the temperature."""

    rate: Float[Array, ""]
    """The most likely e with a Beta(2, 2) prior on 2e, so 1/4 if nothing is known; 0 if
    that is nearly certain."""
    lower: Float[Array, ""]
    """Lower end of the interval of e; 0 if no flips are compatible with the labels."""
    upper: Float[Array, ""]
    """Upper end of the interval."""
    temperature: Float[Array, ""]
    """T of the last block: a margin of average size has log-odds z / T."""
    identified: Bool[Array, ""]
    """Whether the interval is short enough, excludes labels that say nothing (1/2), and
    both halves of the pass agree; if not, report the interval, not `rate`."""
    log_likelihood: Float[Array, " rates"]
    """log P(labels | e) at the rates `linspace(0, 1/2, RATES)`, nats, up to a constant;
    integrated over temperatures and power."""


def no_counts(dtype: DTypeLike = jnp.float32) -> Counts:
    """The counts before the first batch: zeros."""
    zero = jnp.zeros((), dtype)
    return Counts(jnp.zeros((BLOCKS, BINS, 2), dtype), zero, zero, zero, zero)


def count(
    counts: Counts,
    margin_logits: Float[Array, " *batch"],
    *,
    where: Bool[Array, " *batch"] | None = None,
) -> Counts:
    """Adds a batch of margins to the counts.

    Args:
      counts: from `no_counts` or an earlier batch.
      margin_logits: z, nats, positive where the model agrees with the label; [*batch],
        of the global batch, regardless of its sharding.
      where: which labels are real, [*batch]; None if all are.  The other labels are
        ignored, even if they hold NaN.

    Returns:
      The new counts; all of them NaN if a real label's margin is NaN and was traced.

    Raises:
      ValueError: if a real label's margin is NaN.
    """
    z, where = _margins(margin_logits, where)
    dtype = counts.table.dtype
    number = jnp.sum(where).astype(dtype)
    keep = jnp.exp(-number / SCALE_MEMORY)
    size_sum = keep * counts.size_sum + jnp.sum(jnp.abs(z)).astype(dtype)
    size_weight = keep * counts.size_weight + number
    # Uses a comparison, because a scatter along a sharded axis has no sharding rule.
    bins = bins_of(_sizes(z, size_sum, size_weight), PER_OCTAVE)
    own = (bins[..., None] == jnp.arange(BINS)) & where[..., None]
    agrees = jnp.where(z == 0, 0.5, (z > 0).astype(z.dtype))[..., None]
    batch = tuple(range(z.ndim))
    of = lambda share: jnp.sum(jnp.where(own, share, 0), axis=batch)
    new = jnp.stack([of(agrees), of(1 - agrees)], axis=1)
    # NaN agrees with no label and disagrees with none.
    new = jnp.where(jnp.isnan(jnp.sum(z)), jnp.nan, new).astype(dtype)

    start = jnp.maximum(number, SHORTEST)
    length = jnp.where(counts.labels == 0, start, counts.block_length)
    full = counts.labels >= BLOCKS * length
    pairs = jnp.sum(counts.table.reshape(BLOCKS // 2, 2, BINS, 2), axis=1)
    merged = jnp.concatenate([pairs, jnp.zeros_like(pairs)])
    table, length = (
        jnp.where(full, merged, counts.table),
        jnp.where(full, 2 * length, length),
    )
    block = jnp.minimum(jnp.floor(counts.labels / length), BLOCKS - 1)
    chosen = (jnp.arange(BLOCKS) == block)[:, None, None]
    return Counts(
        table=table + jnp.where(chosen, new, 0),
        labels=counts.labels + number,
        block_length=length,
        size_sum=size_sum,
        size_weight=size_weight,
    )


def sizes(
    counts: Counts, margin_logits: Float[Array, " *batch"]
) -> Float[Array, " *batch"]:
    """The sizes |z| / mean of margins that were just counted; 0 if the mean is 0."""
    z = jnp.clip(margin_logits, -LARGEST, LARGEST)
    return _sizes(z, counts.size_sum, counts.size_weight)


def _margins(margin_logits, where) -> tuple[jax.Array, jax.Array]:
    """Checks margins; they are 0 where not real."""
    z = _common.floating(margin_logits)
    where = jnp.ones(z.shape, bool) if where is None else where
    unknown = jnp.sum(jnp.isnan(z) & where)
    if not isinstance(unknown, Tracer) and unknown:
        raise ValueError(f"Expected margins without NaN, got {unknown} NaN.")
    z = jnp.where(where, jnp.clip(z, -LARGEST, LARGEST), 0)
    return jax.lax.stop_gradient(z), where


def _sizes(z, size_sum, size_weight) -> jax.Array:
    mean = size_sum / jnp.maximum(size_weight, 1)
    return jnp.abs(z) / jnp.where(mean > 0, mean, 1)


def bins_of(u: jax.Array, per_octave: int) -> jax.Array:
    """The bin of each size, from 2^`SMALLEST`."""
    place = jnp.log2(jnp.maximum(u, 2.0**SMALLEST)) - SMALLEST
    last = per_octave * OCTAVES - 1
    return jnp.clip(per_octave * place, 0, last).astype(jnp.int32)


def posterior(counts: Counts, *, level: Scalar = 0.95) -> RunningRate:
    """The flip rate and the temperature given the counts.

    The interval holds the rates whose integrated log-likelihood is less than half the
    chi-squared quantile (one degree of freedom) below its maximum.

    Args:
      counts: from `count`.
      level: nominal coverage probability of the interval.

    Returns:
      `RunningRate`; NaN and not identified if a count is NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import running
      >>> z = jnp.array([8.0, 8.0, 8.0, -8.0] * 300 + [2.0, 2.0, -2.0] * 300)
      >>> found = running.posterior(running.count(running.no_counts(), z))
      >>> print(f"{found.rate:.2f} in {found.lower:.2f} to {found.upper:.2f}")
      0.25 in 0.22 to 0.27
    """
    return _posterior(counts, level)


@jax.jit
def _posterior(counts: Counts, level) -> RunningRate:
    counts = jax.tree.map(replicated, counts)
    dtype = counts.table.dtype
    used = jnp.ceil(counts.labels / jnp.maximum(counts.block_length, 1))
    of_powers = jax.lax.map(
        functools.partial(_of_power, counts.table, used // 2),
        jnp.asarray(POWERS, dtype),
    )
    prior = -((jnp.asarray(POWERS, dtype) / POWER_SPREAD) ** 2) / 2
    prior = (prior - logsumexp(prior) - jnp.log(len(STEPS)))[:, None, None]
    whole, first, second = (
        logsumexp(x + prior, axis=(0, 1))
        for x in (of_powers.whole, of_powers.first, of_powers.second)
    )
    rates = jnp.linspace(0, 0.5, RATES, dtype=dtype)
    with_prior = whole + xlogy(1, 2 * rates) + xlog1py(1, -2 * rates)
    # The Beta(2, 2) density of 2e is 6 (2e) (1 - 2e).
    some = logsumexp(with_prior) + jnp.log(jnp.asarray(6 / (RATES - 1), dtype))
    zero = jax.nn.sigmoid(whole[0] - some)
    quantile = lambda level: ndtri((1 + jnp.asarray(level, dtype)) / 2) ** 2 / 2
    lower, upper = _grid.ends(rates, whole, quantile(level))
    apart = jnp.max(first) + jnp.max(second) - jnp.max(first + second)
    rate = jnp.where(zero > SURE, 0, _grid.top(rates, with_prior))
    mean = counts.size_sum / jnp.maximum(counts.size_weight, 1)
    weights = jax.nn.softmax((of_powers.whole + prior).reshape(-1))
    log_t = jnp.sum(weights * of_powers.log_t.reshape(-1))
    nan = 0 * whole[0]  # NaN if a count is NaN
    return RunningRate(
        rate=rate + nan,
        lower=lower + nan,
        upper=upper + nan,
        temperature=jnp.where(mean > 0, mean, 1) * jnp.exp2(log_t),
        identified=(upper - lower < WIDEST)
        & (upper < rates[-1])
        & (apart < quantile(AGREEMENT)),
        log_likelihood=whole,
    )


def grid_of_log_t(dtype: DTypeLike) -> jax.Array:
    """The values of log2 t."""
    return jnp.linspace(COLDEST, HOTTEST, TEMPERATURES, dtype=dtype)


def prior_of_log_t(dtype: DTypeLike) -> jax.Array:
    """Their prior probabilities in the first block."""
    log_t = grid_of_log_t(dtype)
    normal = jax.nn.softmax(-((log_t / START_SPREAD) ** 2) / 2)
    high = (log_t >= IGNORANT).astype(dtype)
    return (normal + high / jnp.sum(high)) / 2


class _OfPower(NamedTuple):
    """Log-likelihoods [steps, rates] given the power c."""

    whole: jax.Array
    first: jax.Array
    """Of the first half of the blocks."""
    second: jax.Array
    """Of the second half alone."""
    log_t: jax.Array
    """Mean of log2 t in the last block."""


def _of_power(table, half, log_power) -> _OfPower:
    """Integrates over the temperatures of all blocks."""
    dtype = table.dtype
    middle = (jnp.arange(BINS, dtype=dtype) + 0.5) / PER_OCTAVE + SMALLEST
    powered = jnp.exp2(middle * jnp.exp2(log_power))
    rates = jnp.linspace(0, 0.5, RATES, dtype=dtype)
    temperatures = grid_of_log_t(dtype)

    def of_temperature(log_t):
        """Log-likelihoods [rates, blocks], relative to a fair coin."""
        link = jnp.minimum(jnp.tanh(powered / jnp.exp2(log_t) / 2), 1 - 1e-6)
        lean = (1 - 2 * rates[:, None]) * link
        # Matrix products, because XLA on CPU (jax 0.10 to 0.12) miscomputes the fused
        # sums.
        dot = functools.partial(jnp.matmul, precision="highest")
        agree, disagree = table[..., 0].T, table[..., 1].T
        return dot(jnp.log1p(lean), agree) + dot(jnp.log1p(-lean), disagree)

    logs = jax.lax.map(of_temperature, temperatures, batch_size=9)
    logs = jnp.moveaxis(logs, 2, 0)
    start = jnp.broadcast_to(prior_of_log_t(dtype)[:, None], logs.shape[1:])

    def chain(step):
        distance = (temperatures[:, None] - temperatures) / step
        kernel = jax.nn.softmax(-(distance**2) / 2, axis=0)
        kernel = (1 - JUMP) * kernel + JUMP / TEMPERATURES

        def advance(density, block):
            moved = jnp.matmul(kernel, density, precision="highest")
            top = jnp.max(block, axis=0)
            joint = moved * jnp.exp(block - top)
            total = jnp.sum(joint, axis=0)
            return joint / total, top + jnp.log(total)

        def of_block(carry, block):
            number, logs = block
            (density, whole), (own, first, second) = carry
            density, gain = advance(density, logs)
            own, own_gain = advance(jnp.where(number == half, start, own), logs)
            return (
                (density, whole + gain),
                (
                    own,
                    first + jnp.where(number < half, own_gain, 0),
                    second + jnp.where(number < half, 0, own_gain),
                ),
            ), None

        zeros = jnp.zeros(RATES, dtype)
        carry = (start, zeros), (start, zeros, zeros)
        blocks = jnp.arange(BLOCKS, dtype=dtype), logs
        ((density, whole), (_, first, second)), _ = jax.lax.scan(
            of_block, carry, blocks
        )
        return _OfPower(whole, first, second, temperatures @ density)

    return jax.vmap(chain)(jnp.asarray(STEPS, dtype))
