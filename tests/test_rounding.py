"""Stochastic rounding: unbiased, exact where it can be, and the same everywhere."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.data.feed import Feed
from jaxpref.objectives import from_loss
from jaxpref.rounding import RoundedState, rounded_stochastically, stochastic_round
from jaxpref.train import Decay, Optimizer, OptimizerConfig, TrainConfig, run
from jaxpref.train.optimizer import make_optimizer, make_schedule

LOW = ml_dtypes.bfloat16


def neighbors(x: float) -> tuple[float, float]:
    """The bfloat16 numbers around x, by numpy."""
    near = LOW(x)
    other = np.nextafter(near, LOW(np.inf if float(near) < x else -np.inf))
    return tuple(sorted((float(near), float(other))))


@pytest.mark.parametrize(
    "x", [1.001, -1.001, 0.1, 3e-5, -7.77e8, 1.9999, 2.0**-126 * 1.3, -1.00001e-30]
)
def test_the_expectation_is_the_number(x):
    count = 20_000
    x = float(np.float32(x))
    values = jax.jit(stochastic_round)(jnp.full(count, x), jax.random.key(3))
    found = np.asarray(values, np.float64)
    low, high = neighbors(x)
    assert set(np.unique(found)) <= {low, high}
    up = (x - low) / (high - low)
    error = (found == high).mean() - up
    assert abs(error) < 4 * np.sqrt(up * (1 - up) / count) + 1e-12


@pytest.mark.parametrize(
    "x", [0.0, -0.0, 1.0, -2.5, 3.0e38, 2.0**-126, np.inf, -np.inf, np.nan]
)
def test_what_bfloat16_represents_stays(x):
    exact = np.float32(LOW(x))
    found = stochastic_round(jnp.full(1000, exact), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.full(1000, exact))


def params_of(dtype):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(0, 0.1, (64, 96)), dtype),
        "norm": jnp.asarray(1 + rng.normal(0, 0.01, 96), dtype),
    }


def grads_of(step, dtype):
    rng = np.random.default_rng([1, step])
    drawn = {"w": rng.normal(0.5, 1, (64, 96)), "norm": rng.normal(0.5, 1, 96)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), drawn)


def trained(tx, dtype, steps, *, state=None, start=0):
    params, state = state or (params_of(dtype), tx.init(params_of(dtype)))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(start, start + steps):
        params, state = step(params, state, grads_of(number, dtype))
    return params, state


def optimizer(rate=1e-6, seed=0, **options):
    config = OptimizerConfig(learning_rate=rate, decay=Decay.CONSTANT, **options)
    return make_optimizer(config, make_schedule(config, 100), seed=seed)


@pytest.mark.parametrize("kind", Optimizer)
def test_small_updates_move_bfloat16_weights_as_far_as_float32(kind):
    """At the default rate, rounding to nearest moves no weight in a thousand."""
    tx = optimizer(optimizer=kind)
    wide, _ = trained(tx, jnp.float32, 50)
    low, _ = trained(tx, jnp.bfloat16, 50)
    moved = lambda end, start: (
        np.asarray(end["w"], np.float64) - np.asarray(start["w"], np.float64)
    )
    expected = moved(wide, params_of(jnp.float32))
    found = moved(low, params_of(jnp.bfloat16))
    # 6,144 weights: the mean has a standard error of 2% of its value.
    assert found.mean() == pytest.approx(expected.mean(), rel=0.1)
    assert (found != 0).mean() > 0.02


def test_moments_in_bfloat16_follow_those_in_float32():
    """With rounding to nearest, the second moment would stop at half its value."""
    tx = optimizer(adam_b2=0.999)
    _, wide = trained(tx, jnp.float32, 300)
    _, low = trained(tx, jnp.bfloat16, 300)
    moments = lambda state: next(
        s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)
    )
    expected, found = moments(wide), moments(low.inner)
    assert found.nu["w"].dtype == found.mu["w"].dtype == jnp.bfloat16
    ratio = np.asarray(found.nu["w"], np.float64) / np.asarray(expected.nu["w"])
    assert ratio.mean() == pytest.approx(1, abs=0.01)
    assert ratio.std() < 0.1


def _is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


def test_float32_is_left_alone():
    config = OptimizerConfig()
    schedule = make_schedule(config, 10)
    tx = make_optimizer(config, schedule, seed=7)
    assert not isinstance(tx.init(params_of(jnp.float32)), RoundedState)
    for seed in (0, 1):
        params, _ = trained(make_optimizer(config, schedule, seed=seed), jnp.float32, 3)
        first = params if seed == 0 else first  # noqa: F821
    jax.tree.map(np.testing.assert_array_equal, params, first)


def test_the_update_gives_the_rounded_weights_exactly():
    tx, params = optimizer(1e-3), params_of(jnp.bfloat16)
    updates, _ = tx.update(grads_of(0, jnp.bfloat16), tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    new = optax.apply_updates(params, updates)
    assert new["w"].dtype == jnp.bfloat16
    exact = np.asarray(params["w"], np.float64) + np.asarray(updates["w"], np.float64)
    np.testing.assert_array_equal(np.asarray(new["w"], np.float64), exact)


def equal_bits(first, second):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        ),
        first,
        second,
    )


def test_an_interrupted_run_rounds_the_same():
    tx = optimizer()
    whole = trained(tx, jnp.bfloat16, 6)
    half = trained(tx, jnp.bfloat16, 3)
    # As after a restart: from the saved arrays, by another program.
    saved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    equal_bits(trained(optimizer(), jnp.bfloat16, 3, state=saved, start=3), whole)


def test_seeds_steps_and_arrays_are_rounded_differently():
    zero = {"a": jnp.full(500, 1.001), "b": jnp.full(500, 1.001)}
    params = jax.tree.map(lambda x: jnp.ones(500, jnp.bfloat16), zero)
    nothing = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda grads, state, params: (jax.tree.map(lambda x: 0.001 + x, grads), state),
    )
    found = []
    for seed in (0, 1):
        tx = rounded_stochastically(nothing, seed=seed)
        state = tx.init(params)
        for _ in range(2):
            grads = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(grads, state, params)
            found += [np.asarray(updates["a"]), np.asarray(updates["b"])]
    for i, one in enumerate(found):
        assert 0 < (one > 0).mean() < 0.5
        assert not any(np.array_equal(one, other) for other in found[:i])


@pytest.mark.parametrize(
    "spec", [P("data", None), P(None, ("data", "tensor")), P("tensor", None)]
)
def test_every_mesh_rounds_the_same(spec):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (16, 24)), jnp.float32)
    key = jax.random.key(5)
    expected = jax.jit(stochastic_round)(x, key)
    types = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=types)
    with jax.set_mesh(mesh):
        placed = jax.device_put(np.asarray(x), NamedSharding(mesh, spec))
        found = jax.jit(stochastic_round)(placed, key)
    assert found.sharding.spec == spec
    equal_bits(found, expected)


@pytest.mark.slow
def test_a_killed_run_in_bfloat16_ends_with_the_same_bits(
    inputs, tmp_path, monkeypatch
):
    draw = Feed.draw

    def trained_to(out, options):
        config = TrainConfig(
            model=str(inputs / "model"),
            data=str(inputs / "pairs.jsonl"),
            out=str(tmp_path / out),
            objective=from_loss(losses.dpo),
            options=DataOptions(max_length=64, heldout_fraction=0.2),
            max_steps=6,
            batch_size=8,
            save_every=2,
            param_dtype="bfloat16",
            optimizer=OptimizerConfig(learning_rate=1e-5),
            **options,
        )
        return load_file(run(config) / "model.safetensors")

    whole = trained_to("whole", {})
    drawn = []

    def struck(feed, state):
        drawn.append(state)
        if len(drawn) == 4:
            raise OSError("struck")
        return draw(feed, state)

    monkeypatch.setattr(Feed, "draw", struck)
    with pytest.raises(OSError, match="struck"):
        trained_to("killed", {})
    resumed = trained_to("killed", {})
    assert len(drawn) == 4 + 4  # from step 2
    for name, values in whole.items():
        np.testing.assert_array_equal(values, resumed[name])
    start = load_file(inputs / "model" / "model.safetensors")
    moved = [np.mean(whole[n] != x.astype(LOW).astype("f4")) for n, x in start.items()]
    assert np.mean(moved) > 0.01
    other = trained_to("other", {"seed": 1})
    assert any((values != other[name]).any() for name, values in whole.items())
