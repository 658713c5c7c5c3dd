"""Gaussian estimators of a known gradient, and the accuracy of their best mixture.

    python -m tests.gradients.simulations

prints the error of the estimated alpha, and by how much the mixture's mean squared
error exceeds the least one, for draws per step, dimension, signal-to-noise ratio and
averaged steps.

The trace gradient is mu + noise, the empty one mu + b_e, not random.  Noise has
independent coordinates with variances all alike ("flat") or proportional to 1 / i
("steep": few directions hold most of the noise, as of a network); b_e is drawn from the
same distribution and fixed for a run, so it lies where the noise is.  The
signal-to-noise ratio is ||b_e||^2 / tr S_t of the trace gradient that is used: the mean
of all K draws, or one of them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.gradients import bvpo

DRAWS = (2, 4, 8, 16)
RATIOS = (0.01, 0.1, 1.0, 10.0, 100.0)
STEPS = (1, 10, 100)
SPECTRA = ("flat", "steep")


def variances(spectrum: str, dimension: int) -> np.ndarray:
    """Variances of the coordinates of one draw, with sum 1."""
    place = np.arange(1, dimension + 1)
    weights = np.ones(dimension) if spectrum == "flat" else 1 / place
    return weights / weights.sum()


@functools.partial(jax.jit, static_argnames=("draws", "steps", "size"))
def noise(key, spread, *, draws, steps, size):
    """b_e of squared norm 1, [1, size], and draws of noise, [steps, draws, size].

    Sketched under one key a step if there are more coordinates than `size`.
    """
    own, key = jax.random.split(key)
    bias = jax.random.normal(own, spread.shape) * spread
    bias = bias / jnp.linalg.norm(bias)

    def step(key):
        one, other = jax.random.split(key)
        z = jax.random.normal(one, (draws, len(spread))) * spread
        both = jnp.concatenate([bias[None], z])
        if size >= len(spread):
            return both
        return jax.vmap(lambda g: bvpo.sketch(g, other, size=size))(both)

    both = jax.lax.map(step, jax.random.split(key, steps))
    return both[:, :1], both[:, 1:]


@functools.partial(jax.jit, static_argnames=("used", "steps"))
def estimates(bias, draws, ratios, *, used, steps):
    """alpha from averages over the first n steps, [steps, ratios], and its optimum."""

    def at(ratio):
        # Everything is linear, so one draw serves all ratios.
        scale = jnp.sqrt(used / ratio)
        one = lambda b, z: bvpo.ingredients(scale * z, b, trace_size=used)
        found = jax.vmap(one)(bias, draws)
        averages = [jax.tree.map(lambda x, t=t: jnp.mean(x[:t]), found) for t in steps]
        return jnp.stack([bvpo.optimal_alpha(**vars(mean)) for mean in averages])

    return jnp.stack([at(ratio) for ratio in ratios], axis=-1)


def errors(
    *,
    dimension,
    spectrum,
    draws=DRAWS,
    ratios=RATIOS,
    steps=STEPS,
    seeds=range(40),
    size=None,
):
    """|alpha - alpha*| and relative excess: [seeds, 2, draws, steps, ratios] each.

    The axis of 2: all draws of a step are used, or one of them.
    """
    spread = jnp.asarray(np.sqrt(variances(spectrum, dimension)), jnp.float32)
    options = {"draws": max(draws), "steps": max(steps), "size": size or dimension}
    found = []
    for seed in seeds:
        bias, z = noise(jax.random.key(seed), spread, **options)
        at = lambda k, used, bias=bias, z=z: estimates(
            bias, z[:, :k], jnp.array(ratios), used=used, steps=steps
        )
        found.append([[at(k, k) for k in draws], [at(k, 1) for k in draws]])
    alpha, ratio = np.array(found, np.float64), np.array(ratios)
    best = ratio / (1 + ratio)
    # The parabola in numpy: tr S_t = 1 / ratio, ||b_e||^2 = 1.
    error = lambda a: a**2 / ratio + (1 - a) ** 2
    return abs(alpha - best), error(alpha) / error(best) - 1


def mixture_excess(*, dimension, spectrum, ratios=RATIOS, draws=4, steps=4000, seed=0):
    """Relative excess error of the mixture, with alpha of this or the previous step.

    [2, ratios]; one step's estimate, nothing averaged.
    """
    spread = jnp.asarray(np.sqrt(variances(spectrum, dimension)), jnp.float32)
    key = jax.random.key(seed)
    bias, z = noise(key, spread, draws=draws, steps=steps, size=dimension)
    rows = []
    for ratio in ratios:
        scale = np.sqrt(draws / ratio)
        found = jax.vmap(
            lambda b, z, scale=scale: bvpo.ingredients(scale * z, b, trace_size=draws)
        )(bias, z)
        alpha = np.asarray(bvpo.optimal_alpha(**vars(found)), np.float64)[:, None]
        trace, empty = scale * np.asarray(z, np.float64).mean(1), np.asarray(bias)[:, 0]
        error = lambda a, t=trace, e=empty: ((a * t + (1 - a) * e) ** 2).sum(1).mean()
        least = error(ratio / (1 + ratio))
        rows.append([error(alpha) / least - 1, error(np.roll(alpha, 1)) / least - 1])
    return np.array(rows).T


SETTINGS = (
    # dimension, sketch, seeds
    (10, None, 40),
    (1000, None, 40),
    (1000, 64, 40),
    (100_000, 64, 20),
    (100_000, 256, 20),
)


def main() -> None:
    """Prints the tables, in about seven minutes on two busy cores."""
    print("mean |alpha - alpha*| +- its standard error / mean excess of the MSE")
    print(f"columns: ||b_e||^2 / tr S_t = {RATIOS}")
    for (dimension, size, seeds), spectrum in itertools.product(SETTINGS, SPECTRA):
        both = errors(
            dimension=dimension, spectrum=spectrum, size=size, seeds=range(seeds)
        )
        for used, name in enumerate(("mean of K used", "one draw used")):
            wrong, excess = (x[:, used] for x in both)
            error = wrong.std(0, ddof=1) / seeds**0.5
            print(f"dimension {dimension}, sketch {size}, {spectrum}, {seeds} seeds,")
            print(f"{name}", flush=True)
            for (i, k), (j, t) in itertools.product(enumerate(DRAWS), enumerate(STEPS)):
                row = zip(wrong.mean(0)[i, j], error[i, j], excess.mean(0)[i, j])
                cells = "  ".join(f"{a:.3f}+-{s:.3f}/{e:5.1%}" for a, s, e in row)
                print(f"  K {k:2}, {t:3} steps: {cells}", flush=True)
    print("excess of the mixture itself, K 4, 1 step: alpha of this step / the last")
    for dimension, spectrum in itertools.product((10, 1000), SPECTRA):
        rows = mixture_excess(dimension=dimension, spectrum=spectrum)
        cells = "  ".join(f"{own:.1%}/{last:.1%}" for own, last in rows.T)
        print(f"dimension {dimension}, {spectrum}: {cells}", flush=True)


if __name__ == "__main__":
    main()
