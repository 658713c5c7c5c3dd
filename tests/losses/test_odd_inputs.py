"""Every loss: no pairs, numpy's numbers, options out of range, one device's part."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.losses.arrays import arrays_of, of_pairs
from tests.losses.row import Row
from tests.losses.table import TABLE
from tests.losses.test_battery import complete, each, every_row, gradients, on_device


@every_row
def test_no_pairs_at_all(row):
    arrays = on_device(of_pairs(lambda a: a[:0], arrays_of(row)), jnp.float32)
    for value in (
        row.loss(*arrays, **row.options[-1]),
        *gradients(row, arrays, **row.options[-1]),
    ):
        assert value.shape == (0,) and value.dtype == jnp.float32


def bare(row: Row, **options):
    """The loss without the run-time annotation checks of this test run."""
    return functools.partial(inspect.unwrap(row.loss), **options)


@each([row for row in TABLE if complete(row, row.options[-1])])
def test_numpy_numbers_are_numbers(row):
    """They give what Python's give, and are checked as those are."""
    arrays = on_device(arrays_of(row), jnp.float32)
    options = complete(row, row.options[-1])
    ours = bare(row, **{k: np.float32(v) for k, v in options.items()})(*arrays)
    theirs = row.loss(*arrays, **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in options:
        with pytest.raises(ValueError, match=rf"{name} .*got nan"):
            bare(row, **options | {name: np.float32("nan")})(*arrays)


# AlphaPO's shape may be any number.
NEGATIVE = [
    (row, name)
    for row in TABLE
    for name in complete(row, row.options[-1])
    if (row.name, name) != ("alpha_po", "alpha")
]


@pytest.mark.parametrize(
    ("row", "name"), NEGATIVE, ids=[f"{row.name}-{name}" for row, name in NEGATIVE]
)
@pytest.mark.parametrize("value", [-0.5, np.float32(-0.5), -float("inf")])
def test_negative_options_are_refused(row, name, value):
    arrays = on_device(arrays_of(row), jnp.float32)
    loss = bare(row, **row.options[-1] | {name: value})
    with pytest.raises(ValueError, match=rf"Expected {name} .*got {value}"):
        jax.eval_shape(loss, *arrays)


@each([row for row in TABLE if row.coupled])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map_a_device_sees_its_own_pairs(row, kind):
    arrays = on_device(arrays_of(row, extreme=False), jnp.float32)
    loss = functools.partial(row.loss, **row.options[-1])
    parts = of_pairs(lambda a: a.reshape(8, -1), arrays)
    axes = [0 if a.ndim else None for a in arrays]
    expected = jax.vmap(loss, axes)(*parts).reshape(-1)
    mesh = jax.make_mesh((8,), ("data",), (kind,))
    specs = tuple(PartitionSpec("data") if a.ndim else PartitionSpec() for a in arrays)
    with jax.set_mesh(mesh):
        run = jax.shard_map(loss, in_specs=specs, out_specs=PartitionSpec("data"))
        ours = jax.jit(run)(
            *(
                jax.device_put(a, jax.NamedSharding(mesh, s))
                for a, s in zip(arrays, specs)
            )
        )
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-6)
