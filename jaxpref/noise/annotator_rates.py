"""Flip rates of annotators during training, partially pooled toward a common rate.

`jaxpref.noise.running` estimates the rate of all labels and the link: how the agreement
of a label of average reliability depends on the size of the margin.  With the pooled
rate e and u the size of the margin, annotator k with the rate e_k has

    P(agree) = 1/2 + (1/2 - e_k) g(u; e),        e_k ~ Beta(m s, (1 - m) s)

g(.; e) is the posterior mean of the link of `running` given e and all labels.  The
labels of an annotator are spread over the pass, so one link for the whole pass is
enough.  Mean m and size s are learned from all annotators and integrated over: if they
differ little, s is large, and annotators with few labels get nearly the common rate; if
they differ much, each keeps its own.  A rate may be above 1/2 (an adversary).  The
intervals also integrate over the pooled rate e.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import xlog1py, xlogy
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses._common import Scalar
from jaxpref.noise import _common, running
from jaxpref.sharding import replicated

__all__ = ["AnnotatorRates", "count", "no_counts", "posterior"]

PER_OCTAVE = 2
BINS = PER_OCTAVE * running.OCTAVES
"""Bins of u, with edges a factor of 2^(1/2) apart."""
RATES = 199
"""Rates of an annotator on the grid, evenly spaced in (0, 1)."""
POOLED = 9
"""Values of the pooled rate, at quantiles of its posterior."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnnotatorRates:
    """Estimated flip rates of annotators."""

    rate: Float[Array, " annotators"]
    """Posterior mean of e_k, given the most likely pooled rate and link."""
    lower: Float[Array, " annotators"]
    """Lower end of the credible interval of e_k."""
    upper: Float[Array, " annotators"]
    """Upper end of the interval."""
    spread: Float[Array, ""]
    """Standard deviation of the annotators' rates: posterior mean of the prior's."""


def no_counts(
    num_annotators: int, dtype: DTypeLike = jnp.float32
) -> Float[Array, "annotators bins 2"]:
    """The counts before the first batch: zeros."""
    return jnp.zeros((num_annotators, BINS, 2), dtype)


def count(
    table: Float[Array, "annotators bins 2"],
    counts: running.Counts,
    margin_logits: Float[Array, " *batch"],
    annotators: Int[Array, " *batch"],
    *,
    where: Bool[Array, " *batch"],
) -> Float[Array, "annotators bins 2"]:
    """Adds a batch to the counts of agreeing and disagreeing labels by annotator.

    Args:
      table: from `no_counts` or an earlier batch.
      counts: from `running.count`, which has just counted this batch.
      margin_logits: z, nats; [*batch], of the global batch.
      annotators: int index of each label's annotator; others, such as -1, are not
        counted; [*batch].
      where: which labels are real; [*batch].

    Returns:
      The new counts.
    """
    z = jax.lax.stop_gradient(_common.floating(margin_logits))
    z = jnp.where(where, z, 0)
    bins = running.bins_of(running.sizes(counts, z), PER_OCTAVE)
    z, bins, annotators, where = (
        replicated(x).reshape(-1) for x in (z, bins, annotators, where)
    )
    agrees = jnp.where(z == 0, 0.5, (z > 0).astype(z.dtype))
    agrees = jnp.where(jnp.isnan(z), jnp.nan, agrees)
    whose = (annotators[:, None] == jnp.arange(table.shape[0])) & where[:, None]
    size = (bins[:, None] == jnp.arange(BINS)).astype(table.dtype)
    of = lambda share: jnp.matmul(
        jnp.where(whose, share[:, None], 0).astype(table.dtype).T,
        size,
        precision="highest",
    )
    return table + jnp.stack([of(agrees), of(1 - agrees)], axis=-1)


def posterior(
    table: Float[Array, "annotators bins 2"],
    pooled: running.RunningRate,
    *,
    level: Scalar = 0.95,
) -> AnnotatorRates:
    """The flip rates of the annotators given the counts.

    Args:
      table: from `count`.
      pooled: from `running.posterior`, of all labels.
      level: posterior probability of the equal-tailed intervals.

    Returns:
      `AnnotatorRates`; an annotator without labels has the mean and the interval of the
      prior.

    References:
      Gelman et al., "Bayesian Data Analysis", 2013, 5.3, for the hyperprior
      (s + 2)^(-5/2).
    """
    return _posterior(table, pooled, level)


@jax.jit
def _posterior(table, pooled, level) -> AnnotatorRates:
    dtype = table.dtype
    table, pooled = jax.tree.map(replicated, (table, pooled))
    rates = jnp.linspace(0, 0.5, running.RATES, dtype=dtype)
    pooled_logs = pooled.log_likelihood + xlogy(1, 2 * rates) + xlog1py(1, -2 * rates)
    below = jnp.cumsum(jax.nn.softmax(pooled_logs))  # up to the middle between rates
    middles = (jnp.arange(POOLED, dtype=dtype) + 0.5) / POOLED
    given = jnp.concatenate(
        [pooled.rate[None], jnp.interp(middles, below, rates + rates[1] / 2)]
    )
    of_rates, spreads = jax.lax.map(functools.partial(_given_pooled, table), given)
    mass = jnp.mean(of_rates[1:], axis=0)  # [annotators, RATES]
    grid = _grid(dtype)
    mean = of_rates[0] @ grid
    edges = jnp.linspace(0, 1, RATES + 1, dtype=dtype)
    below = jnp.pad(jnp.cumsum(mass, axis=1), ((0, 0), (1, 0)))
    tail = (1 - jnp.asarray(level, dtype)) / 2
    quantile = lambda p: jax.vmap(lambda b: jnp.interp(p, b, edges))(below)
    return AnnotatorRates(
        rate=mean,
        lower=jnp.minimum(quantile(tail), mean),
        upper=jnp.maximum(quantile(1 - tail), mean),
        spread=jnp.mean(spreads[1:]),
    )


def _grid(dtype) -> jax.Array:
    """Rates of an annotator."""
    return (jnp.arange(RATES, dtype=dtype) + 0.5) / RATES


def _given_pooled(table, pooled_rate):
    """Posteriors [annotators, RATES], and the prior's spread, given the pooled rate."""
    dtype = table.dtype
    link = _link(jnp.sum(table, axis=0), pooled_rate)
    grid = _grid(dtype)
    dot = functools.partial(jnp.matmul, precision="highest")
    lean = (1 - 2 * grid)[:, None] * link
    logs = dot(jnp.log1p(lean), table[..., 0].T) + dot(
        jnp.log1p(-lean), table[..., 1].T
    )
    likelihood = jnp.exp(logs - jnp.max(logs, axis=0))  # [RATES, annotators]
    means = jnp.linspace(0.01, 0.69, 24, dtype=dtype)
    sizes = jnp.exp2(jnp.linspace(1, 10, 10, dtype=dtype))
    m, s = (x.reshape(-1, 1) for x in jnp.meshgrid(means, sizes))
    shape = (m * s - 1) * jnp.log(grid) + ((1 - m) * s - 1) * jnp.log1p(-grid)
    prior = jax.nn.softmax(shape, axis=1)  # [priors, RATES]
    evidence = jnp.maximum(dot(prior, likelihood), jnp.finfo(dtype).tiny)
    # Evenly spaced in log s, whose density is s times that of s.
    score = jnp.sum(jnp.log(evidence), axis=1) + jnp.log(s[:, 0])
    weights = jax.nn.softmax(score - 2.5 * jnp.log(s[:, 0] + 2))
    mixed = dot((weights[:, None] / evidence).T, prior) * likelihood.T
    spread = jnp.sqrt(m * (1 - m) / (s + 1))[:, 0]
    return mixed / jnp.sum(mixed, axis=1, keepdims=True), jnp.sum(weights * spread)


def _link(total: Float[Array, "bins 2"], pooled_rate) -> Float[Array, " bins"]:
    """Posterior mean of g(u) given the labels of all annotators and their rate."""
    dtype = total.dtype
    middle = (jnp.arange(BINS, dtype=dtype) + 0.5) / PER_OCTAVE + running.SMALLEST
    powers = jnp.asarray(running.POWERS, dtype)
    steps = running.grid_of_log_t(dtype)
    power, log_t = (x.reshape(-1, 1) for x in jnp.meshgrid(powers, steps))
    links = jnp.tanh(jnp.exp2(middle * jnp.exp2(power) - log_t) / 2)
    links = jnp.minimum(links, 1 - 1e-6)
    lean = (1 - 2 * pooled_rate) * links
    dot = functools.partial(jnp.matmul, precision="highest")
    logs = dot(jnp.log1p(lean), total[:, 0]) + dot(jnp.log1p(-lean), total[:, 1])
    prior = -((power[:, 0] / running.POWER_SPREAD) ** 2) / 2
    prior = prior + jnp.repeat(jnp.log(running.prior_of_log_t(dtype)), len(powers))
    return dot(jax.nn.softmax(logs + prior), links)
