"""Tests that every loss must pass; the expectations are in rows_*.py."""

import doctest
import functools
import importlib
import inspect
import pkgutil

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

import jaxpref.losses
from jaxpref import losses
from tests.losses.arrays import PAIRS, arrays_of, differentiable, of_pairs, swapped
from tests.losses.row import Row
from tests.losses.table import TABLE


def complete(row: Row, options) -> dict:
    return row.defaults | options


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def each_case(holds):
    cases = [
        pytest.param(row, options, id="-".join([row.name, *map(str, options.values())]))
        for row in TABLE
        if holds(row)
        for options in row.options
    ]
    return pytest.mark.parametrize(("row", "options"), cases)


def holds_fixed(row: Row) -> bool:
    """Whether the loss has a stop-gradient, so its gradient is no derivative."""
    return "frozen" in inspect.signature(row.oracle).parameters


every_case = each_case(lambda row: True)
every_row = each(TABLE)
every_flip_row = each([row for row in TABLE if row.base is not None])
every_coupled_row = each([row for row in TABLE if row.coupled])
every_elementwise_row = each([row for row in TABLE if not row.coupled])
every_separable_row = each([row for row in TABLE if not row.coupled])


def on_device(arrays, dtype):
    return [jnp.asarray(array, dtype) for array in arrays]


def gradients(row: Row, arrays, **options):
    """Gradients of the summed loss in all arrays that training changes, as a list."""
    total = lambda *a: jnp.sum(row.loss(*a, **options))
    return list(jax.grad(total, argnums=tuple(differentiable(row)))(*arrays))


def oracle_of(row: Row, options):
    """`(arrays, frozen) -> loss [N]` in long double."""
    wide = lambda arrays: [np.asarray(a, np.longdouble) for a in arrays]
    options = complete(row, options)

    def oracle(arrays, frozen):
        if holds_fixed(row):
            return row.oracle(*wide(arrays), frozen=wide(frozen), **options)
        return row.oracle(*wide(arrays), **options)

    return oracle


def oracle_gradients(row: Row, arrays, options, step=2.0**-17):
    """Central differences of the oracle's sum, in every array that training changes."""
    oracle = oracle_of(row, options)
    derivatives = []
    for i in differentiable(row):
        derivative = np.zeros(PAIRS, np.longdouble)
        # Independent pairs can all be changed at once.
        groups = np.eye(PAIRS, dtype=bool) if row.coupled else [np.ones(PAIRS, bool)]
        for group in groups:
            sides = []
            for sign in (1, -1):
                moved = [np.asarray(a, np.longdouble) for a in arrays]
                moved[i] = moved[i] + sign * step * group
                sides.append(oracle(moved, arrays))
            difference = sides[0] - sides[1]
            derivative[group] = difference.sum() if row.coupled else difference
        derivatives.append((derivative / (2 * step)).astype(float))
    return derivatives


def test_every_loss_has_a_row():
    functions = [getattr(losses, name) for name in losses.__all__]
    kinds = ("policy_chosen_logps", "policy_chosen_joint_logps")
    kinds += ("chosen_masked_log_ratios", "chosen_rewards")
    pairwise = lambda f: (
        set(kinds) & set(inspect.signature(f).parameters)
        and not f.__name__.startswith("reward_")
    )
    assert {f.__name__ for f in functions if pairwise(f)} == {r.name for r in TABLE}


@every_row
def test_defaults_are_the_papers(row):
    parameters = inspect.signature(row.loss).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    given.pop("where", None)
    required = {name for name, value in given.items() if value is inspect._empty}
    assert {n: v for n, v in given.items() if n not in required} == row.defaults
    assert all(required <= set(options) for options in row.options)


@every_case
def test_value_is_the_papers(row, options):
    arrays = arrays_of(row)
    expected = oracle_of(row, options)(arrays, arrays).astype(float)
    assert expected.shape == (PAIRS,)
    with jax.enable_x64(True):
        exact = row.loss(*on_device(arrays, jnp.float64), **options)
        assert exact.dtype == jnp.float64 and exact.shape == (PAIRS,)
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-12)
    single = row.loss(*on_device(arrays, jnp.float32), **options)
    np.testing.assert_allclose(single, expected, rtol=2e-6, atol=2e-6)


@every_case
def test_gradient_is_the_papers(row, options):
    arrays = arrays_of(row)
    expected = oracle_gradients(row, arrays, options)
    with jax.enable_x64(True):
        exact = gradients(row, on_device(arrays, jnp.float64), **options)
    single = gradients(row, on_device(arrays, jnp.float32), **options)
    for wide, narrow, paper in zip(exact, single, expected, strict=True):
        np.testing.assert_allclose(wide, paper, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(narrow, paper, rtol=1e-5, atol=1e-6)


@every_case
def test_finite_at_extremes(row, options):
    """Margins of +-1e4 in float32 and in bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = on_device(arrays_of(row), dtype)
        values = [row.loss(*arrays, **options), *gradients(row, arrays, **options)]
        for value in values:
            assert np.isfinite(np.asarray(value, np.float32)).all()


@each([row for row in TABLE if not holds_fixed(row)])
def test_gradient_matches_finite_differences(row):
    moving = differentiable(row)
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(row, extreme=False), jnp.float64)

        def loss(*moved):
            values = list(arrays)
            for i, value in zip(moving, moved):
                values[i] = value
            return row.loss(*values, **row.options[-1])

        # jit: check_grads passes numpy arrays.
        on = [arrays[i] for i in moving]
        check_grads(jax.jit(loss), on, order=1, modes=("fwd", "rev"))


@each_case(lambda row: row.at_reference is not None)
def test_policy_equal_to_reference(row, options):
    arrays = dict(zip(row.reads, on_device(arrays_of(row, extreme=False), jnp.float32)))
    for name in row.reads:
        if name.startswith("policy"):
            arrays[name.replace("policy", "reference")] = arrays[name]
    value = row.loss(**arrays, **options)
    expected = row.at_reference(**complete(row, options))
    np.testing.assert_allclose(value, expected, rtol=2e-7)


@each([row for row in TABLE if row.special])
def test_special_cases_are_other_losses(row):
    with jax.enable_x64(True):
        arrays = dict(
            zip(row.reads, on_device(arrays_of(row, extreme=False), jnp.float64))
        )
        for options, other, other_options in row.special:
            reads = inspect.signature(other).parameters
            theirs = other(
                *(arrays[n] for n in row.reads if n in reads), **other_options
            )
            ours = row.loss(**arrays, **options)
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@functools.cache
def compiled(row: Row, index: int):
    """The loss under the row's `index`-th options, compiled once for every example."""
    return jax.jit(functools.partial(row.loss, **row.options[index]))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(data=strategies.data())
@every_row
def test_symmetries_hold_for_any_input(row, data):
    """Swapped answers, invariance to shifts, and rate 0."""
    draw = lambda low, high: data.draw(
        hypothesis.extra.numpy.arrays(
            np.float64, 4, elements=strategies.floats(low, high, width=32)
        )
    )
    arrays = []
    for drawn, name in zip(arrays_of(row, extreme=False, pairs=4), row.reads):
        low, high = row.draw.get(name, (-40.0, 0.0))
        arrays.append(draw(low, high) if name.endswith("logps") else drawn)
    index = data.draw(strategies.integers(0, len(row.options) - 1))
    options = complete(row, row.options[index])
    shift = data.draw(strategies.floats(-100, 100))
    with jax.enable_x64(True):
        loss = compiled(row, index)
        value = np.asarray(loss(*on_device(arrays, jnp.float64)))
        if row.mirror is not None:
            exchanged = on_device(swapped(row, arrays), jnp.float64)
            residual = row.mirror(
                value, np.asarray(loss(*exchanged)), *arrays, **options
            )
            np.testing.assert_allclose(residual, 0, atol=1e-9)
        for names in row.shifts:
            assert set(names) <= set(row.reads)
            moved = [a + shift * (n in names) for a, n in zip(arrays, row.reads)]
            after = loss(*on_device(moved, jnp.float64))
            np.testing.assert_allclose(after, value, rtol=1e-9, atol=1e-9)


@every_row
def test_jit_vmap_sharded_and_eager_agree(row):
    options = row.options[-1]
    both = lambda *a: (row.loss(*a, **options), gradients(row, a, **options))
    arrays = on_device(arrays_of(row), jnp.float32)
    eager = both(*arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    jax.tree.map(close, jax.jit(both)(*arrays), eager)
    other = on_device(arrays_of(row, seed=1), jnp.float32)
    stacked = [jnp.stack(pair) for pair in zip(arrays, other)]
    mapped = jax.jit(jax.vmap(both))(*stacked)
    jax.tree.map(close, jax.tree.map(lambda x: x[0], mapped), eager)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (kind,) * 2)
        with jax.set_mesh(mesh):
            spec = PartitionSpec(("data", "fsdp"))
            sharding = jax.NamedSharding(mesh, spec)
            placed = of_pairs(
                functools.partial(jax.device_put, device=sharding), arrays
            )
            sharded = jax.jit(both)(*placed)
            if kind is AxisType.Explicit:
                for value in jax.tree.leaves(sharded):
                    assert jax.typeof(value).sharding.spec == spec
                # The layout of a training batch: rows in the middle, slots last.
                cube = PartitionSpec(None, ("data", "fsdp"))
                rows = of_pairs(lambda a: a.reshape(1, 8, 2), arrays)
                place = functools.partial(
                    jax.device_put, device=jax.NamedSharding(mesh, cube)
                )
                cubes = of_pairs(place, rows)
                jax.tree.map(
                    lambda ours, theirs: close(np.asarray(ours).reshape(-1), theirs),
                    jax.jit(both)(*cubes),
                    eager,
                )
        jax.tree.map(close, sharded, eager)


@every_row
def test_dtype_is_at_least_float32(row):
    options = row.options[-1]
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        arrays = on_device(arrays_of(row, extreme=False), dtype)
        assert row.loss(*arrays, **options).dtype == jnp.float32
        for gradient in gradients(row, arrays, **options):
            assert gradient.dtype == dtype
    half = on_device(arrays_of(row, extreme=False), jnp.bfloat16)
    whole = row.loss(*(array.astype(jnp.float32) for array in half), **options)
    np.testing.assert_array_equal(row.loss(*half, **options), whole)


@every_row
def test_any_leading_axes_are_allowed(row):
    options = row.options[-1]
    arrays = on_device(arrays_of(row), jnp.float32)
    flat = row.loss(*arrays, **options)
    cube = row.loss(*of_pairs(lambda a: a.reshape(2, 4, 2), arrays), **options)
    assert cube.shape == (2, 4, 2)
    np.testing.assert_allclose(cube.reshape(-1), flat, rtol=2e-6, atol=1e-6)


@every_separable_row
def test_pairs_are_independent(row):
    options = row.options[-1]
    arrays = on_device(arrays_of(row), jnp.float32)
    together = row.loss(*arrays, **options)
    alone = row.loss(*(array[3:5] for array in arrays), **options)
    np.testing.assert_allclose(alone, together[3:5], rtol=2e-6, atol=1e-6)
    scalar = row.loss(*(array[3] for array in arrays), **options)
    assert scalar.shape == ()
    np.testing.assert_allclose(scalar, together[3], rtol=2e-6, atol=1e-6)


@every_coupled_row
def test_padding_changes_nothing(row):
    """Pairs masked by `where` may hold anything, including NaN."""
    options = row.options[-1]
    real = arrays_of(row, extreme=False)
    real = of_pairs(lambda a: a[: PAIRS - 5], real)
    where = jnp.arange(PAIRS) % 3 > 0
    where = where & (jnp.cumsum(where) <= PAIRS - 5)
    count = int(where.sum())

    def padding(array):
        whole = np.full(PAIRS, np.nan)
        whole[np.asarray(where)] = array[:count]
        return whole

    alone = on_device(of_pairs(lambda a: a[:count], real), jnp.float32)
    padded = on_device(of_pairs(padding, real), jnp.float32)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    value = row.loss(*padded, where=where, **options)
    close(value[where], row.loss(*alone, **options))
    assert not value[~where].any()
    for ours, theirs in zip(
        gradients(row, padded, where=where, **options), gradients(row, alone, **options)
    ):
        close(ours[where], theirs)
        assert not ours[~where].any()
    nothing = row.loss(*padded, where=jnp.zeros(PAIRS, bool), **options)
    assert not nothing.any()


@every_flip_row
def test_zero_flip_rate_is_the_base_loss_bit_for_bit(row):
    options = row.options[-1] | {"flip_rate": 0.0}
    plain = {k: v for k, v in options.items() if k != "flip_rate"}
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = on_device(arrays_of(row), dtype)
        total = lambda f, o: lambda *a: jnp.sum(f(*a, **o))
        pairs = (
            (row.loss(*arrays, **options), row.base(*arrays, **plain)),
            (
                jax.grad(total(row.loss, options))(*arrays),
                jax.grad(total(row.base, plain))(*arrays),
            ),
        )
        for ours, base in pairs:
            np.testing.assert_array_equal(ours, base, strict=True)


@every_elementwise_row
def test_every_option_may_differ_between_pairs(row):
    """The oracle of each pair with its own option; all at once as for one number."""
    arrays = arrays_of(row, extreme=False)
    for name, largest in complete(row, row.options[-1]).items():
        own = jnp.asarray(largest * np.linspace(0.9, 1.0, PAIRS), jnp.float32)
        alone = []
        for i, value in enumerate(own):
            oracle = oracle_of(row, row.options[-1] | {name: float(value)})
            pair = [a[i : i + 1] for a in arrays]
            alone.append(float(oracle(pair, pair)[0]))
        found = row.loss(
            *on_device(arrays, jnp.float32), **row.options[-1] | {name: own}
        )
        assert np.isfinite(alone).all()
        # As for one number: float32.
        np.testing.assert_allclose(found, alone, rtol=2e-6, atol=2e-6, err_msg=name)


@every_flip_row
def test_one_rate_per_pair_and_axis(row):
    arrays = on_device(arrays_of(row), jnp.float32)
    rates = np.linspace(0.0, 0.45, PAIRS).astype(np.float32)
    cube = row.loss(
        *(a.reshape(4, 4) for a in arrays), flip_rate=jnp.asarray(rates[:4])
    )
    rows = [row.loss(*(a[i::4] for a in arrays), flip_rate=float(r))
            for i, r in enumerate(rates[:4])]  # fmt: skip
    np.testing.assert_allclose(cube.T, np.stack(rows), rtol=2e-6, atol=1e-6)


# Invalid arguments.


@every_flip_row
@pytest.mark.parametrize("rate", [-0.1, 0.5, 0.7, 1, float("nan")])
def test_flip_rate_out_of_range_is_rejected(row, rate):
    arrays = on_device(arrays_of(row), jnp.float32)
    with pytest.raises(ValueError, match=rf"flip_rate in \[0, 0.5\), got {rate}"):
        jax.eval_shape(functools.partial(row.loss, flip_rate=rate), *arrays)


@every_flip_row
@pytest.mark.parametrize("shape", [(3,), (1, PAIRS)])
def test_wrong_shape_of_flip_rate_is_rejected(row, shape):
    loss = inspect.unwrap(row.loss)
    with pytest.raises(ValueError, match=r"flip_rate to broadcast .* \(16,\), got"):
        loss(*on_device(arrays_of(row), jnp.float32), flip_rate=jnp.zeros(shape))


@each([row for row in TABLE if "beta" in row.defaults])
@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf")])
def test_beta_out_of_range_is_rejected(row, beta):
    options = row.options[-1] | {"beta": beta}
    arrays = on_device(arrays_of(row), jnp.float32)
    with pytest.raises(ValueError, match=f"beta > 0 and finite, got {beta}"):
        jax.eval_shape(functools.partial(row.loss, **options), *arrays)


@every_row
def test_options_that_are_not_numbers_are_rejected(row):
    """NaN is outside the range of every hyperparameter."""
    arrays = on_device(arrays_of(row), jnp.float32)
    for name in complete(row, row.options[-1]):
        options = row.options[-1] | {name: float("nan")}
        with pytest.raises(ValueError, match=rf"{name} .*got nan"):
            jax.eval_shape(functools.partial(row.loss, **options), *arrays)


@every_row
def test_options_with_other_axes_are_rejected(row):
    """They would broadcast against the pairs."""
    arrays = on_device(arrays_of(row), jnp.float32)
    loss = inspect.unwrap(row.loss)
    coupled = "where" in inspect.signature(row.loss).parameters
    expected = (
        "one number, got" if coupled else r"broadcast to the .* got shape \(16, 1"
    )
    for name in complete(row, row.options[-1]):
        for value, message in ((jnp.ones((PAIRS, 1)), expected), ("0.1", "one number")):
            with pytest.raises(ValueError, match=f"{name} to (be )?{message}"):
                loss(*arrays, **row.options[-1] | {name: value})


@each([row for row in TABLE if len(row.reads) > 1])
def test_wrong_shapes_are_rejected(row):
    """Without the runtime annotation checks of this test run, as for a caller."""
    loss = functools.partial(inspect.unwrap(row.loss), **row.options[-1])
    for i, name in enumerate(row.reads):
        if name.startswith("running"):
            continue
        arrays = on_device(arrays_of(row), jnp.float32)
        arrays[i] = arrays[i][:3]
        with pytest.raises(ValueError, match=rf"one shape, got .*{name} \(3,\)"):
            loss(*arrays)


@every_coupled_row
def test_wrong_shape_of_where_is_rejected(row):
    loss = functools.partial(inspect.unwrap(row.loss), **row.options[-1])
    arrays = on_device(arrays_of(row), jnp.float32)
    with pytest.raises(ValueError, match=r"one shape, got .*where \(3,\)"):
        loss(*arrays, where=jnp.ones(3, bool))


@every_row
def test_integers_are_rejected(row):
    arrays = [jnp.ones(PAIRS, jnp.int32) for _ in row.reads]
    with pytest.raises(TypeError, match=f"{row.reads[0]} to be floating point"):
        inspect.unwrap(row.loss)(*arrays, **row.options[-1])


@each([row for row in TABLE if "chosen_lengths" in row.reads])
def test_empty_completion_is_finite(row):
    """A completion truncated to nothing has log-prob 0 and length 0."""
    arrays = [jnp.zeros(2)] * len(row.reads)
    for value in [
        row.loss(*arrays, **row.options[-1]),
        *gradients(row, arrays, **row.options[-1]),
    ]:
        assert np.isfinite(value).all()


MODULES = [
    importlib.import_module(f"jaxpref.losses.{module.name}")
    for module in pkgutil.iter_modules(jaxpref.losses.__path__)
    if module.name != "_common"
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
def test_docstring_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted >= len(module.__all__) and not result.failed


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
def test_docstrings_are_complete(module):
    for name in module.__all__:
        documented = inspect.getdoc(getattr(module, name))
        for section in ("Args:", "Returns:", "Raises:", "Examples:"):
            assert f"\n{section}\n" in documented, f"{name} lacks {section}"
        assert f"import {name}" in documented, f"{name}: the example imports another"
