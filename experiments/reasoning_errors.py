"""Errors of mixed gradients relative to the true one, with a fixed or learned alpha.

There are two errors of a gradient from B pairs with K sampled traces each (their mean)
and B pairs with an empty trace, both drawn from a population of pairs:

    "traces"            relative to the marginal gradient of these B pairs: only the
                        traces vary
    "traces and pairs"  relative to the marginal gradient of the whole population, as in
                        stochastic gradient descent

Both are parabolas in alpha, determined by three numbers per step: ||e_t||^2, ||e_e||^2,
and <e_t, e_e>, with e = gradient - truth.  "auto" uses only the sampled gradients:
`jaxpref.gradients.bvpo.ingredients` of each step, averaged by `running`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import reasoning_gradients as exact_sums
from experiments.reasoning_gradients import Exact, Language
from jaxpref.gradients import bvpo

KINDS = ("traces", "traces and pairs")
GRID = tuple(round(0.1 * n, 1) for n in range(11))
"""The fixed alphas."""


@dataclasses.dataclass(frozen=True)
class Population:
    """N pairs with traces and N with an empty trace, and their exact gradients."""

    pairs: np.ndarray
    """int [N, 3]: prompt, chosen and rejected answer; of pairs with traces."""
    base_logps: jax.Array
    """[N, 2, R]: log ref(r, y|x), from which traces are sampled."""
    exact: Exact
    """With a leading axis of pairs."""
    empty: jax.Array
    """[N, P]: gradients of the pairs with an empty trace."""


def make_population(
    model, params, base, language: Language, pairs, empty_pairs, *, beta
) -> Population:
    """Computes the exact quantities for the policy `params` and reference `base`."""
    base_logps = _trace_logps(model, base, language, jnp.asarray(pairs))
    found = _exact(model, params, language, jnp.asarray(pairs), base_logps, beta=beta)
    start = language.prompts.shape[1] + len(language.empty)
    rows = exact_sums.empty_sequences(language, np.asarray(empty_pairs))
    flat = rows.reshape(-1, rows.shape[-1])
    empty_logps = _completion_logps(model, base, flat, start=start).reshape(-1, 2)
    empty = _drawn(model, params, rows, empty_logps, start=start, beta=beta)
    return Population(np.asarray(pairs), base_logps, found, empty)


_trace_logps = jax.jit(exact_sums.trace_logps, static_argnums=(0, 2))
_exact = jax.jit(exact_sums.exact, static_argnums=(0, 2), static_argnames="beta")
_completion_logps = jax.jit(
    exact_sums.completion_logps, static_argnums=0, static_argnames="start"
)
_drawn = jax.jit(
    exact_sums.drawn_gradients, static_argnums=0, static_argnames=("start", "beta")
)


# ---- the closed form ---------------------------------------------------------------


def true_ingredients(population: Population, *, batch: int, traces: int) -> dict:
    """The six exact quantities of each kind of error, averaged over batches.

    Batches draw pairs with replacement, both kinds independently.
    """
    marginal, trace, variance = population.exact
    bias, empty = trace - marginal, population.empty
    mean = lambda x: jnp.mean(x, axis=0)
    cov = lambda x, y: (
        (jnp.mean(jnp.sum(x * y, axis=1)) - jnp.sum(mean(x) * mean(y))) / batch
    )
    drawn = jnp.mean(variance) / (batch * traces)
    b_t, b_e = mean(bias), mean(empty) - mean(marginal)
    zero = jnp.zeros(())
    kinds = {
        "traces": bvpo.Ingredients(
            trace_variance=drawn,
            empty_variance=zero,
            covariance=zero,
            trace_bias_sq=jnp.sum(b_t**2) + cov(bias, bias),
            empty_bias_sq=jnp.sum(b_e**2) + cov(empty, empty) + cov(marginal, marginal),
            bias_dot=jnp.sum(b_t * b_e) - cov(bias, marginal),
        ),
        "traces and pairs": bvpo.Ingredients(
            trace_variance=drawn + cov(trace, trace),
            empty_variance=cov(empty, empty),
            covariance=zero,
            trace_bias_sq=jnp.sum(b_t**2),
            empty_bias_sq=jnp.sum(b_e**2),
            bias_dot=jnp.sum(b_t * b_e),
        ),
    }
    return {
        kind: {name: float(x) for name, x in vars(found).items()}
        for kind, found in kinds.items()
    }


# ---- measurements ------------------------------------------------------------------


@functools.partial(
    jax.jit,
    static_argnums=(0, 2),
    static_argnames=("steps", "batch", "traces", "beta", "decay"),
)
def measure_errors(
    model, params, language, population, key, *, steps, batch, traces, beta, decay
) -> dict[str, dict[str, jax.Array]]:
    """Three numbers per step for each kind of error, and auto's alpha; [steps].

    `population` is the tuple of `Population`'s fields.
    """
    pairs, base_logps, exact, empty = population
    average = bvpo.running(decay=decay)

    def one(states, key):
        of_trace, of_empty, of_traces = jax.random.split(key, 3)
        chosen = jax.random.randint(of_trace, (batch,), 0, len(pairs))
        without = jax.random.randint(of_empty, (batch,), 0, len(empty))
        grads = draw(
            model,
            params,
            language,
            pairs[chosen],
            base_logps[chosen],
            of_traces,
            traces=traces,
            beta=beta,
        )
        g_e = jnp.mean(empty[without], axis=0)
        truths = {
            "traces": jnp.mean(exact.marginal[chosen], axis=0),
            "traces and pairs": jnp.mean(exact.marginal, axis=0),
        }
        founds = {
            "traces": bvpo.ingredients(
                jnp.mean(grads, axis=0), g_e[None], trace_size=traces
            ),
            "traces and pairs": bvpo.ingredients(
                jnp.mean(grads, axis=1),
                empty[without],
                trace_size=batch,
                empty_size=batch,
            ),
        }
        g_t = jnp.mean(grads, axis=(0, 1))
        records, following = {}, {}
        for kind, truth in truths.items():
            e_t, e_e = g_t - truth, g_e - truth
            alpha, following[kind] = average.update(founds[kind], states[kind])
            error = bvpo.mix(g_t, g_e, alpha) - truth
            records[kind] = {
                "trace": jnp.sum(e_t**2),
                "empty": jnp.sum(e_e**2),
                "both": jnp.sum(e_t * e_e),
                "alpha": alpha,
                "auto": jnp.sum(error**2),
            }
        return following, records

    states = {kind: average.init() for kind in KINDS}
    _, records = jax.lax.scan(one, states, jax.random.split(key, steps))
    return records


def draw(model, params, language, pairs, base_logps, key, *, traces, beta):
    """Gradients with traces drawn from the reference, [B, K, P] of pairs [B, 3]."""
    shape = (traces, *base_logps.shape[:-1])
    picked = jnp.moveaxis(jax.random.categorical(key, base_logps, shape=shape), 0, 1)
    take = lambda of_pair, index: jnp.take_along_axis(
        of_pair, index.reshape(index.shape + (1,) * (of_pair.ndim - 2)), axis=1
    )

    def one(pair, picked, logps):
        rows = exact_sums.pair_sequences(language, pair)
        return (
            jnp.stack([take(rows, k[:, None])[:, 0] for k in picked]),
            jnp.stack([take(logps, k[:, None])[:, 0] for k in picked]),
        )

    rows, logps = jax.vmap(one)(pairs, picked, base_logps)
    start = language.prompts.shape[1]
    return exact_sums.drawn_gradients(
        model, params, rows, logps, start=start, beta=beta
    )


def errors_by_alpha(records: dict) -> list[float]:
    """Mean squared errors of the fixed alphas over the steps."""
    t, e, both = (float(np.mean(records[k])) for k in ("trace", "empty", "both"))
    return [a * a * t + (1 - a) ** 2 * e + 2 * a * (1 - a) * both for a in GRID]


def measure_variances(
    model, params, language, population: Population, key, *, batch, redraws, beta
) -> dict[str, list[float]]:
    """Variance of the mixture over resampled traces of one batch, and its prediction.

    `measured` is the variance of `bvpo.mix` of sampled gradients (one trace per pair);
    `law` is alpha^2 times the exact variance of the trace gradient.  The batch consists
    of the first pairs of the population.
    """
    drawn = _redraw(
        model,
        params,
        language,
        population.pairs[:batch],
        population.base_logps[:batch],
        jax.random.split(key, redraws),
        beta=beta,
    )
    g_e = jnp.mean(population.empty[:batch], axis=0)
    exact = float(jnp.sum(population.exact.trace_variance[:batch])) / batch**2
    return {
        "measured": [mixture_variance(drawn, g_e, alpha) for alpha in GRID],
        "law": [alpha**2 * exact for alpha in GRID],
    }


def mixture_variance(drawn, empty_gradient, alpha) -> float:
    """Variance of `bvpo.mix` over drawn trace gradients [n, P], summed over P."""
    mixed = jax.vmap(bvpo.mix, (0, None, None))(drawn, empty_gradient, alpha)
    return float(jnp.sum(jnp.var(mixed, axis=0, ddof=1)))


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames="beta")
def _redraw(model, params, language, pairs, base_logps, keys, *, beta):
    """The batch's gradient with one trace per pair, for every key: [n, P]."""

    def one(key):
        grads = draw(
            model, params, language, pairs, base_logps, key, traces=1, beta=beta
        )
        return jnp.mean(grads, axis=(0, 1))

    return jax.lax.map(one, keys)
