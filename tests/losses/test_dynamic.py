"""What beta-DPO and gamma-PO promise; the battery is in test_battery.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpref import losses
from jaxpref.losses._dynamic_targets import _target_margins
from tests.losses.rows_dynamic import targets

MARGINS = np.random.default_rng(0).normal(1.0, 2.0, 16)


def explicit(function, *arrays):
    """The function's outputs on eight devices, and their layouts."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, PartitionSpec("data"))
        placed = [jax.device_put(a, sharding) if a.ndim else a for a in arrays]
        outputs = jax.jit(function)(*placed)
        return outputs, [jax.typeof(x).sharding.spec for x in jax.tree.leaves(outputs)]


def test_margin_moments_move_by_a_tenth():
    with jax.enable_x64(True):
        mean, std = losses.margin_moments(jnp.asarray(MARGINS), 0.5, 3.0)
        assert mean.dtype == jnp.float64
    np.testing.assert_allclose(mean, 0.9 * 0.5 + 0.1 * MARGINS.mean(), rtol=1e-13)
    np.testing.assert_allclose(std, 0.9 * 3 + 0.1 * MARGINS.std(ddof=1), rtol=1e-13)
    half = jnp.asarray(MARGINS, jnp.bfloat16)
    mean, std = losses.margin_moments(half, 0.0, 0.0, momentum=0.0)
    assert mean.dtype == std.dtype == jnp.float32 and mean.shape == std.shape == ()
    np.testing.assert_allclose(mean, np.asarray(half, np.float64).mean(), rtol=1e-6)


def test_margin_moments_of_few_pairs():
    margins = jnp.array([3.0, jnp.nan, 5.0, jnp.inf])
    real = jnp.array([True, False, True, False])
    mean, std = losses.margin_moments(margins, 0.0, 0.0, momentum=0, where=real)
    np.testing.assert_allclose([mean, std], [4, np.sqrt(2)], rtol=1e-6)
    one = losses.margin_moments(margins, 0.0, 1.0, where=real & (margins < 4))
    np.testing.assert_allclose(one, [0.3, 0.9], rtol=1e-6)
    none = losses.margin_moments(margins, 2.0, 1.0, where=jnp.zeros(4, bool))
    np.testing.assert_array_equal(none, [2, 1])


def test_no_margins_at_all():
    none = jnp.zeros(0)
    assert losses.beta_dpo_selection(none, 0.0, 1.0, jax.random.key(0)).shape == (0,)
    np.testing.assert_array_equal(losses.margin_moments(none, 2.0, 1.0), [2, 1])


def test_margin_moments_are_held_fixed_and_sharded_as_alone():
    margins = jnp.asarray(MARGINS, jnp.float32)
    gradient = jax.grad(lambda m: sum(losses.margin_moments(m, 0.0, 0.0)))(margins)
    assert not gradient.any()
    moments = lambda m: losses.margin_moments(m, 0.5, 3.0)
    ours, specs = explicit(moments, margins)
    np.testing.assert_allclose(ours, moments(margins), rtol=2e-6)
    assert specs == [PartitionSpec(), PartitionSpec()]


@pytest.mark.parametrize(
    ("pairs", "rate", "kept"),
    [(10, 0.2, 8), (10, 0.3, 7), (15, 0.2, 12), (64, 0.2, 51), (7, 0, 7), (7, 1, 0)],
)
def test_selection_counts_exactly(pairs, rate, kept):
    """int(n (1 - rate)) of the real ones, whatever the weights."""
    margins = jnp.concatenate([jnp.linspace(-500, 500, pairs), jnp.full(3, jnp.nan)])
    real = jnp.arange(pairs + 3) < pairs
    for seed in range(5):
        drawn = losses.beta_dpo_selection(
            margins, 0.0, 1e-3, jax.random.key(seed), drop_rate=rate, where=real
        )
        assert drawn.dtype == bool and drawn.sum() == kept and not drawn[pairs:].any()


def test_selection_follows_the_weights():
    """The first drawn of three is i with probability w_i / sum w."""
    margins = jnp.array([0.0, 1.0, 2.0])
    draw = lambda key: losses.beta_dpo_selection(margins, 0.5, 1.0, key, drop_rate=0.6)
    keys = jax.random.split(jax.random.key(0), 20_000)
    share = jax.vmap(draw)(keys).mean(0)
    weights = np.exp(-0.5 * (np.arange(3) - 0.5) ** 2)
    # Four standard errors of a share: 4 sqrt(0.25 / 20000) = 0.014.
    np.testing.assert_allclose(share, weights / weights.sum(), atol=0.015)


def test_selection_prefers_the_usual_and_survives_the_unusual():
    margins = jnp.array([0.0, 0.1, -0.1, 1e4, -1e4], jnp.bfloat16)
    drawn = losses.beta_dpo_selection(
        margins, 0.0, 1.0, jax.random.key(1), drop_rate=0.4
    )
    np.testing.assert_array_equal(drawn, [True, True, True, False, False])
    alike = jnp.zeros(10)
    keys = jax.random.split(jax.random.key(0), 500)
    draw = lambda mean: jax.vmap(
        lambda key: losses.beta_dpo_selection(alike, mean, 0.0, key)
    )(keys)
    for mean in (0.0, 1.0):  # no spread: an equal chance, 0.8, give or take 4 errors
        np.testing.assert_allclose(draw(mean).mean(0), 0.8, atol=0.075)


def test_selection_is_the_same_however_the_batch_is_split():
    margins = jnp.asarray(MARGINS, jnp.float32)
    draw = lambda m: losses.beta_dpo_selection(m, 1.0, 2.0, jax.random.key(3))
    ours, specs = explicit(draw, margins)
    np.testing.assert_array_equal(ours, draw(margins))
    assert specs == [PartitionSpec("data")]
    cube = losses.beta_dpo_selection(
        margins.reshape(2, 4, 2), 1.0, 2.0, jax.random.key(3)
    )
    np.testing.assert_array_equal(cube.reshape(-1), ours)
    old = losses.beta_dpo_selection(margins, 1.0, 2.0, jax.random.PRNGKey(3))
    np.testing.assert_array_equal(old, ours)


def test_one_step_of_beta_dpo():
    """As the authors: update the moments, select, then beta from the selected."""
    margins = jnp.asarray(MARGINS, jnp.float32)
    zero = jnp.zeros(16)
    mean, std = losses.margin_moments(margins, 0.0, 0.0)
    chosen = losses.beta_dpo_selection(margins, mean, std, jax.random.key(0))
    loss = losses.beta_dpo(margins, zero, zero, zero, mean, where=chosen)
    kept = MARGINS[np.asarray(chosen)]
    assert kept.size == 12
    beta = max(1e-3, 0.1 * (1 + 0.6 * (kept.mean() - 0.1 * MARGINS.mean())))
    np.testing.assert_allclose(loss[chosen], np.log1p(np.exp(-beta * kept)), rtol=1e-5)
    assert not loss[~chosen].any()


def test_beta_dpo_has_a_floor():
    margins, zero = jnp.full(4, -100.0), jnp.zeros(4)
    loss = losses.beta_dpo(margins, zero, zero, zero, 0.0)
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.1)), rtol=1e-5)


def test_the_moments_must_be_numbers():
    margins = jnp.zeros(4)
    beta_dpo = inspect.unwrap(losses.beta_dpo)
    with pytest.raises(ValueError, match=r"running_mean to be one .* \(4,\)"):
        beta_dpo(margins, margins, margins, margins, margins)
    moments = inspect.unwrap(losses.margin_moments)
    with pytest.raises(ValueError, match=r"running_std to be one .* \(4,\)"):
        moments(margins, 0.0, margins)
    selection = inspect.unwrap(losses.beta_dpo_selection)
    with pytest.raises(ValueError, match=r"running_mean to be one .* \(1,\)"):
        selection(margins, jnp.zeros(1), 0.0, jax.random.key(0))
    with pytest.raises(ValueError, match=r"where \(3,\)"):
        moments(margins, 0.0, 0.0, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="margins to be floating point"):
        moments(jnp.zeros(4, int), 0.0, 0.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_rates_out_of_range_are_refused(value):
    margins = jnp.zeros(4)
    with pytest.raises(ValueError, match=rf"drop_rate in \[0, 1\], got {value}"):
        losses.beta_dpo_selection(margins, 0.0, 1.0, jax.random.key(0), drop_rate=value)
    with pytest.raises(ValueError, match=rf"momentum in \[0, 1\], got {value}"):
        losses.margin_moments(margins, 0.0, 1.0, momentum=value)


@pytest.mark.parametrize("tau", [0.01, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("gamma", [0.1, 4.0])
def test_target_margins(gamma, tau):
    """Mean gamma, at most all of it on one pair, larger for larger margins."""
    with jax.enable_x64(True):
        margins = jnp.sort(jnp.asarray(MARGINS))
        ours = _target_margins(margins, gamma, tau, jnp.ones(16, bool))[1]
        np.testing.assert_allclose(ours.mean(), gamma, rtol=1e-12)
        assert (ours > 0).all() and (jnp.diff(ours) >= 0).all()
        if tau >= 1:
            expected = targets(np.asarray(margins, np.longdouble), gamma, tau)
            np.testing.assert_allclose(ours, expected.astype(float), rtol=1e-11)


def test_target_margins_are_where_the_authors_steps_lead():
    """Their exponentiated gradient steps, 200 instead of 20, on one batch."""
    gamma, tau, n = 4.0, 10.0, 16
    p = np.full(n, 1 / n)
    for _ in range(200):
        gradient = tau * (1 + np.log(n * p)) + gamma / (
            1 + np.exp(MARGINS - gamma * n * p)
        )
        p = p * np.exp(-0.5 / tau * gradient)
        p /= p.sum()
    with jax.enable_x64(True):
        ours = _target_margins(jnp.asarray(MARGINS), gamma, tau, jnp.ones(n, bool))[1]
    np.testing.assert_allclose(ours, gamma * n * p, rtol=1e-10)
