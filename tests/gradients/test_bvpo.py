"""The best mixture, against grids and samples in numpy; running averages; optax."""

import doctest
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies

import jaxpref.gradients.bvpo
from jaxpref import gradients
from jaxpref.gradients import _ingredients, _sketches, bvpo
from jaxpref.losses import dpo
from tests.gradients import simulations

SIX = (
    "trace_variance",
    "empty_variance",
    "covariance",
    "trace_bias_sq",
    "empty_bias_sq",
    "bias_dot",
)
GRID = np.linspace(0, 1, 2001)


def random_setting(seed):
    """Biases and a joint covariance of both estimators, and their six quantities."""
    random = np.random.default_rng(seed)
    d = random.integers(1, 6)
    biases = random.normal(size=(2, d)) * np.exp(random.normal(0, 1.5, (2, 1)))
    root = random.normal(size=(2 * d, 2 * d)) * np.exp(random.normal(0, 1.0))
    root[d:] *= np.exp(random.normal(0, 1.0))
    joint = root @ root.T
    numbers = (
        np.trace(joint[:d, :d]),
        np.trace(joint[d:, d:]),
        np.trace(joint[:d, d:]),
        biases[0] @ biases[0],
        biases[1] @ biases[1],
        biases[0] @ biases[1],
    )
    return biases, root, dict(zip(SIX, numbers))


def test_exported_names():
    assert gradients.bvpo is jaxpref.gradients.bvpo


@pytest.mark.parametrize("module", [bvpo, _ingredients, _sketches])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_closed_form_is_the_grid_minimum_of_samples():
    """The error of sampled mixtures in numpy: its minimizer and minimum."""
    for seed in range(20):
        (b_t, b_e), root, six = random_setting(seed)
        random = np.random.default_rng(seed)
        z = random.normal(size=(20_000, root.shape[1]))
        # Whitened, so that sample moments are exact and the minimizer is sharp.
        z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T, ddof=0)).T)
        noise = z @ root.T
        trace, empty = np.split(noise, 2, axis=1)
        grid = GRID[::20]
        error = [
            (((a * (trace + b_t)) + (1 - a) * (empty + b_e)) ** 2).sum(1).mean()
            for a in grid
        ]
        alpha = bvpo.optimal_alpha(**six)
        np.testing.assert_allclose(alpha, grid[np.argmin(error)], atol=0.02)
        ours = bvpo.mean_squared_error(grid, **six)
        np.testing.assert_allclose(ours, error, rtol=1e-3)


def test_optimal_alpha_is_never_worse_than_any_other():
    """For 300 settings at once, as arrays."""
    settings = [random_setting(seed)[2] for seed in range(300)]
    six = {name: np.array([s[name] for s in settings]) for name in SIX}
    with jax.enable_x64(True):
        alpha = bvpo.optimal_alpha(**six)
        assert alpha.dtype == jnp.float64 and alpha.shape == (300,)
        least = bvpo.mean_squared_error(alpha, **six)
        a = GRID[:, None]
        error = (
            a**2 * (six["trace_bias_sq"] + six["trace_variance"])
            + (1 - a) ** 2 * (six["empty_bias_sq"] + six["empty_variance"])
            + 2 * a * (1 - a) * (six["bias_dot"] + six["covariance"])
        )
        assert (least <= error * (1 + 1e-12)).all()
        np.testing.assert_allclose(alpha, GRID[error.argmin(0)], atol=1e-3)
    ends = np.isin(np.asarray(alpha), (0, 1))
    assert 0 < ends.sum() < 300


positive = strategies.floats(0, 1e6, width=32)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    positive, positive, positive, positive, *[strategies.floats(-1, 1)] * 2
)
def test_the_closed_form_for_any_six_numbers(s_t, s_e, t, e, correlation, cosine):
    """Finite, in [0, 1], not worse than the ends, scale invariant, and symmetric."""
    s_te, dot = correlation * (s_t * s_e) ** 0.5, cosine * (t * e) ** 0.5
    with jax.enable_x64(True):
        six = dict(zip(SIX, map(jnp.float64, (s_t, s_e, s_te, t, e, dot))))
        alpha = bvpo.optimal_alpha(**six)
        assert 0 <= alpha <= 1
        error = functools.partial(bvpo.mean_squared_error, **six)
        slack = 1e-9 * (s_t + s_e + t + e)
        assert error(alpha) <= min(error(0), error(1)) + slack
        doubled = {name: 4 * value for name, value in six.items()}
        np.testing.assert_allclose(bvpo.optimal_alpha(**doubled), alpha, rtol=1e-9)
        other = dict(zip(SIX, map(jnp.float64, (s_e, s_t, s_te, e, t, dot))))
        back = 1 - bvpo.optimal_alpha(**other)
        np.testing.assert_allclose(error(back), error(alpha), rtol=1e-7, atol=slack)


@pytest.mark.parametrize("ratio", [1e-4, 0.1, 1.0, 30.0])
def test_the_special_case(ratio):
    """b_t = 0, g_e not random: ||b_e||^2 / (||b_e||^2 + tr S_t)."""
    six = dict.fromkeys(SIX, 0.0) | {"trace_variance": 2.0, "empty_bias_sq": 2 * ratio}
    np.testing.assert_allclose(
        bvpo.optimal_alpha(**six), ratio / (1 + ratio), rtol=1e-6
    )


def test_equal_gradients_and_negative_estimates():
    zeros = dict.fromkeys(SIX, 0)
    assert bvpo.optimal_alpha(**zeros) == 0.5
    assert bvpo.optimal_alpha(**dict.fromkeys(SIX, 0.1)) == 0.5  # g_t = g_e
    assert bvpo.optimal_alpha(**zeros | {"empty_bias_sq": -1.0}) == 0.5
    noisy = {"trace_variance": 1.0, "empty_bias_sq": -0.3}
    assert bvpo.optimal_alpha(**zeros | noisy) == 0
    both = noisy | {"empty_variance": 1.0}
    assert bvpo.optimal_alpha(**zeros | both) == 0.5
    assert bvpo.optimal_alpha(**zeros | {"trace_variance": 1e30}) == 0
    gradient = jax.grad(lambda v: bvpo.optimal_alpha(**zeros | {"empty_bias_sq": v}))
    assert np.isfinite(gradient(0.0))


def test_jit_and_vmap():
    six = {name: jnp.arange(1.0, 5.0) for name in SIX} | {"bias_dot": jnp.zeros(4)}
    eager = bvpo.optimal_alpha(**six)
    one = lambda six: bvpo.optimal_alpha(**six)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(six), eager, rtol=1e-6)
    half = {name: jnp.bfloat16(1) for name in SIX}
    assert bvpo.optimal_alpha(**half).dtype == jnp.float32


def test_theorem_one():
    """Conditional on the data, the variance is alpha^2 times the trace gradient's."""
    random = np.random.default_rng(0)
    trace = random.normal(3.0, 2.0, (4000, 7)).astype(np.float32)
    empty = random.normal(size=7).astype(np.float32)
    for alpha in (0.1, 0.5, 0.9, 1.0):
        mixed = jax.vmap(lambda g, a=alpha: bvpo.mix(g, empty, a))(trace)
        ratio = np.var(mixed, axis=0).sum() / np.var(trace, axis=0).sum()
        np.testing.assert_allclose(ratio, alpha**2, rtol=5e-4)


def test_mix():
    trace = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": [np.float32(1)]}
    empty = jax.tree.map(lambda x: -3 * x, trace)
    out = jax.jit(bvpo.mix)(trace, empty, 0.75)
    jax.tree.map(np.testing.assert_allclose, out, jax.tree.map(lambda x: 0 * x, trace))
    for alpha, end in ((1, trace), (0, empty)):
        jax.tree.map(np.testing.assert_array_equal, bvpo.mix(trace, empty, alpha), end)
    half = jnp.ones(3, jnp.bfloat16)
    assert bvpo.mix(half, half, jnp.float32(0.3)).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = bvpo.mix(jnp.ones(2), jnp.zeros(2), jnp.float32(0.5))
        assert wide.dtype == jnp.float64
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\], got 2"):
        bvpo.mix(half, half, 2)
    with pytest.raises(ValueError, match="one shape"):
        bvpo.mix(half, jnp.ones(4), 0.5)
    with pytest.raises(ValueError):
        bvpo.mix({"a": half}, {"b": half}, 0.5)


def test_a_constant_alpha_is_one_backward_pass():
    """On a small model: mixed gradients equal the gradient of the mixed loss."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "in": jax.random.normal(keys[0], (5, 8)),
        "out": jax.random.normal(keys[1], (8,)),
    }
    sides = [jax.random.normal(key, (2, 16, 5)) for key in keys[2:4]]

    def loss(params, pairs):
        chosen, rejected = jnp.tanh(pairs @ params["in"]) @ params["out"]
        return jnp.mean(dpo(chosen, rejected, 0 * chosen, 0 * rejected, beta=0.3))

    for alpha in (0.0, 0.3, 1.0):
        mixed = lambda p, a=alpha: a * loss(p, sides[0]) + (1 - a) * loss(p, sides[1])
        one = jax.grad(mixed)(params)
        two = bvpo.mix(*(jax.grad(loss)(params, side) for side in sides), alpha)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
        jax.tree.map(close, one, two)


# Over steps


def some(seed, **changes):
    numbers = np.random.default_rng(seed).uniform(0.5, 2, 6)
    six = dict(zip(SIX, map(jnp.float32, numbers))) | {"bias_dot": jnp.float32(0)}
    return bvpo.Ingredients(**six | changes)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_running_averages(decay):
    """Weighted means in numpy, weights decay^age normalized; alpha of the means."""
    steps = [some(seed) for seed in range(6)]
    average = bvpo.running(decay=decay)
    state = average.init()
    for count, found in enumerate(steps, 1):
        alpha, state = jax.jit(average.update)(found, state)
        weights = decay ** np.arange(count)[::-1]
        means = {
            name: np.average([getattr(s, name) for s in steps[:count]], weights=weights)
            for name in SIX
        }
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            vars(state.means),
            means,
        )
        np.testing.assert_allclose(alpha, bvpo.optimal_alpha(**means), rtol=1e-5)
        np.testing.assert_allclose(state.weight, 1 - decay**count, rtol=1e-5)


def test_a_step_without_estimates_changes_nothing():
    average = bvpo.running(decay=0.9, initial_alpha=0.3)
    nothing = some(0, covariance=jnp.float32(jnp.nan))
    alpha, state = average.update(nothing, average.init())
    np.testing.assert_allclose(alpha, 0.3)
    assert state.weight == 0
    first, state = average.update(some(1), state)
    np.testing.assert_allclose(first, bvpo.optimal_alpha(**vars(some(1))))
    same, after = average.update(some(2, trace_variance=jnp.inf), state)
    assert same == first
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_running_keeps_its_types_in_a_scan():
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            average = bvpo.running(decay=0.5)
            numbers = bvpo.Ingredients(*[jnp.ones(7, dtype) for _ in SIX])
            step = lambda state, found, average=average: average.update(found, state)[
                ::-1
            ]
            state, alphas = jax.lax.scan(step, average.init(), numbers)
            assert alphas.dtype == dtype and state.weight.dtype == dtype
            np.testing.assert_allclose(state.means.trace_variance, 1, rtol=1e-6)


@pytest.mark.parametrize("make", [bvpo.running, bvpo.auto_mix])
def test_invalid_options_are_rejected(make):
    for wrong in ({"decay": 1}, {"decay": -0.1}, {"decay": 0.5, "initial_alpha": 2}):
        with pytest.raises(ValueError, match=r"Expected (decay|initial_alpha)"):
            make(**wrong)


def test_auto_mix_comes_first_in_a_chain():
    """It works as an optax transformation and returns the stated mixture."""
    random = np.random.default_rng(3)
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    draw = lambda count: jax.tree.map(
        lambda p: jnp.asarray(random.normal(1.0, 1.0, (count, *p.shape)), p.dtype),
        params,
    )
    traces, empty = draw(4), draw(1)
    chain = optax.chain(bvpo.auto_mix(decay=0.9), optax.sgd(1.0))
    state = chain.init(params)
    updates, state = jax.jit(chain.update)((traces, empty), state, params)
    flat = lambda tree, k: np.concatenate(
        [np.reshape(x, (k, -1)) for x in jax.tree.leaves(tree)], axis=1
    )
    t, e = flat(traces, 4).astype(np.float64), flat(empty, 1).astype(np.float64)
    variance = t.var(0, ddof=1).sum() / 4
    bias_sq = max(((e[0] - t.mean(0)) ** 2).sum() - variance, 0)
    alpha = bias_sq / (bias_sq + variance)
    expected = alpha * t.mean(0) + (1 - alpha) * e[0]
    np.testing.assert_allclose(flat(updates, 1)[0], -expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state[0].means.trace_variance, variance, rtol=1e-5)
    moved = optax.apply_updates(params, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(params)


# The accuracy of alpha, `python -m tests.gradients.simulations`


@pytest.mark.parametrize("spectrum", simulations.SPECTRA)
@pytest.mark.parametrize(("dimension", "size"), [(10, None), (1000, None), (1000, 64)])
def test_alpha_within_a_tenth_of_the_best(dimension, size, spectrum):
    """K = 4, all used, ten steps averaged, where mixing gains 10% over the ends."""
    wrong, excess = simulations.errors(
        dimension=dimension,
        spectrum=spectrum,
        size=size,
        draws=(4,),
        ratios=(0.1, 1.0, 10.0),
        steps=(10,),
        seeds=range(100, 140),
    )
    assert (wrong.mean(0) <= 0.1).all()
    assert (excess >= -1e-6).all()
