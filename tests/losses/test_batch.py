"""Properties of losses that couple a batch, beyond test_battery.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpref import losses
from tests.losses.arrays import arrays_of, differentiable, of_pairs
from tests.losses.table import TABLE

COUPLED = [row for row in TABLE if row.coupled]
RANKED = [losses.aot, losses.aot_unpaired]


def four(seed=0, pairs=64, scale=4.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0, scale, pairs)) for _ in range(4)]


def value_and_derivatives(loss, arrays):
    """The batch loss, mean over pairs, and its gradient in the policy's log-probs."""
    mean = lambda pc, pr: loss(pc, pr, *arrays[2:]).mean()
    return jax.value_and_grad(mean, argnums=(0, 1))(*arrays[:2])


@pytest.mark.parametrize("beta_prime", [1e-3, 0.1, 1.0, 30.0, 1e9])
def test_dr_dpo_is_the_papers_batch_loss(beta_prime):
    """The mean is -b' log mean exp(-l / b'), in value and gradient."""

    def paper(*arrays):
        fit = jax.nn.log_sigmoid(arrays[0] - arrays[1] - arrays[2] + arrays[3])
        together = jax.nn.logsumexp(fit / beta_prime) - np.log(fit.size)
        return -beta_prime * together[None]

    with jax.enable_x64(True):
        arrays = four()
        loss = functools.partial(losses.dr_dpo, beta=1.0, beta_prime=beta_prime)
        # The paper's form amplifies rounding errors by b'.
        tolerance = 1e-12 * max(1, beta_prime)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=tolerance),
            value_and_derivatives(loss, arrays),
            value_and_derivatives(paper, arrays),
        )


def test_dr_dpo_limits():
    """P9: the mean for b' -> infinity, the minimum for b' -> 0, -log mean s at 1."""
    with jax.enable_x64(True):
        arrays = four()
        plain = losses.dpo(*arrays, beta=1.0)
        dr_dpo = lambda b: losses.dr_dpo(*arrays, beta=1.0, beta_prime=b).mean()
        np.testing.assert_allclose(dr_dpo(1e12), plain.mean(), rtol=1e-11)
        np.testing.assert_allclose(dr_dpo(1e-9), plain.min(), atol=1e-8)
        np.testing.assert_allclose(dr_dpo(1.0), -np.log(np.exp(-plain).mean()))
        falling = [float(dr_dpo(b)) for b in (1e6, 30.0, 1.0, 0.1, 1e-3)]
        assert falling == sorted(falling, reverse=True)
        assert falling[0] <= plain.mean() and falling[-1] >= plain.min()


def test_dr_dpo_is_accurate_in_float32_for_a_large_beta_prime():
    """b' amplifies the rounding error of a log near 1; weights are within 1e-5."""
    arrays = [array.astype(jnp.float32) for array in four()]
    ours = losses.dr_dpo(*arrays, beta=1.0, beta_prime=1e6)
    np.testing.assert_allclose(
        ours, losses.dpo(*arrays, beta=1.0), rtol=3e-5, atol=3e-5
    )


def test_dr_dpo_and_kl_dpo_weight_in_opposite_directions():
    """A contradicted pair loses weight in one and gains it in the other."""
    margin = jnp.array([2.0, 2.0, 2.0, -2.0])
    zero = jnp.zeros(4)
    derivative = lambda loss: jax.grad(
        lambda m: loss(m, zero, zero, zero, beta=1.0).sum()
    )(margin)
    plain = derivative(losses.dpo)
    trusting, worried = (
        derivative(losses.dr_dpo) / plain,
        derivative(losses.kl_dpo) / plain,
    )
    assert trusting[3] < 0.3 < 1 < trusting[0] and worried[3] > 2 > 1 > worried[0]


def test_kl_dpo_caps_its_weights():
    margin = jnp.array([0.0] * 7 + [-1e4])
    zero = jnp.zeros(8)
    ours = losses.kl_dpo(margin, zero, zero, zero, tau=0.005)
    np.testing.assert_allclose(ours[7] / losses.dpo(margin, zero, zero, zero)[7], 10)


@pytest.mark.parametrize("loss", RANKED)
def test_ranked_losses_are_equivariant_to_permutations(loss):
    """P16: permuting the pairs permutes the losses, and preserves their mean."""
    arrays = four()
    order = np.random.default_rng(1).permutation(64)
    ours = loss(*(array[order] for array in arrays), beta=1.0)
    np.testing.assert_array_equal(ours, loss(*arrays, beta=1.0)[order])


@pytest.mark.parametrize(("loss", "side"), [(RANKED[0], (2, 3)), (RANKED[1], (1, 3))])
def test_ranked_losses_do_not_depend_on_the_pairing(loss, side):
    """P16: permuting the values of one side does not change the loss."""
    arrays = four()
    order = np.random.default_rng(1).permutation(64)
    moved = [a[order] if i in side else a for i, a in enumerate(arrays)]
    np.testing.assert_array_equal(loss(*moved), loss(*arrays))


@pytest.mark.parametrize("loss", RANKED)
def test_ranked_losses_of_one_pair_are_dpo(loss):
    arrays = [array[:1] for array in four()]
    np.testing.assert_allclose(loss(*arrays), losses.dpo(*arrays, beta=0.01), rtol=1e-6)


@pytest.mark.parametrize("loss", RANKED)
def test_ranked_losses_are_the_sorted_differences(loss):
    """The authors' form: sort both sides and subtract, in value and gradient."""
    pairs = {"aot": ((0, 1), (2, 3)), "aot_unpaired": ((0, 2), (1, 3))}[loss.__name__]

    def paper(*arrays):
        sides = [jnp.sort(arrays[i] - arrays[j]) for i, j in pairs]
        return -jax.nn.log_sigmoid(sides[0] - sides[1])

    with jax.enable_x64(True):
        arrays = four()
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12),
            value_and_derivatives(functools.partial(loss, beta=1.0), arrays),
            value_and_derivatives(paper, arrays),
        )
        ours = np.sort(np.asarray(loss(*arrays, beta=1.0)))
        np.testing.assert_allclose(ours, np.sort(paper(*arrays)), rtol=1e-12)


@pytest.mark.parametrize("loss", RANKED)
def test_ranked_losses_ignore_shifts(loss):
    with jax.enable_x64(True):
        arrays = four()
        expected = loss(*arrays, beta=1.0)
        for moved in ((0, 2), (1, 3), (0, 1), (2, 3)):
            shifted = [a + 32.0 * (i in moved) for i, a in enumerate(arrays)]
            ours = loss(*shifted, beta=1.0)
            np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("row", COUPLED, ids=lambda row: row.name)
@pytest.mark.parametrize(
    "shape",
    [(16,), *(pytest.param(x, marks=pytest.mark.slow) for x in ((8, 2), (1, 16)))],
)
def test_sharding_of_the_batch_does_not_matter(row, shape):
    """Any mesh and layout, and padding on one device only, give the same numbers."""
    options = row.options[-1]
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays_of(row, extreme=False)]
    where = jnp.arange(16) < 13

    def both(*arrays, where):
        total = lambda *a: row.loss(*a, where=where, **options).sum()
        gradients = jax.grad(total, argnums=tuple(differentiable(row)))(*arrays)
        return row.loss(*arrays, where=where, **options), gradients

    alone = both(*arrays, where=where)
    meshes = [((8,), PartitionSpec("a")), ((2, 4), PartitionSpec("b"))]
    meshes += [((4, 2), PartitionSpec(("a", "b")))]
    for sizes, spec in meshes:
        if shape == (8, 2) or shape == (1, 16):
            spec = PartitionSpec(*([None] * (shape[0] == 1)), *spec)
        mesh = jax.make_mesh(
            sizes, ("a", "b")[: len(sizes)], (AxisType.Explicit,) * len(sizes)
        )
        with jax.set_mesh(mesh):
            sharding = jax.NamedSharding(mesh, spec)
            place = lambda a, to=sharding: jax.device_put(a.reshape(shape), to)
            split = jax.jit(both)(*of_pairs(place, arrays), where=place(where))
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(
                np.asarray(ours).reshape(-1), theirs, rtol=2e-6, atol=1e-6
            ),
            split,
            alone,
        )
