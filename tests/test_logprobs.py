"""Token log-probs: the value, its gradient, its memory and its layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from scipy.special import log_softmax

from jaxpref.models.logprobs import token_logps, token_statistics

B, T, D, V, P = 4, 9, 6, 10, 7


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    predictors = rng.integers(0, T, (B, P))
    predictors[:, -2:] = 0  # unused places repeat a position
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
        predictors,
        rng.integers(0, V, (B, P)),
        rng.normal(size=(B, P)).astype(np.float32),
    )


def oracle(hidden, head, predictors, targets, weights):
    """Log-probs and the gradients of their weighted sum, in float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logps = np.zeros(targets.shape)
    d_hidden, d_head = np.zeros_like(hidden), np.zeros_like(head)
    for b, p in np.ndindex(*targets.shape):
        h, y = hidden[b, predictors[b, p]], targets[b, p]
        z = h @ head
        log_softmax = z - z.max() - np.log(np.exp(z - z.max()).sum())
        logps[b, p] = log_softmax[y]
        dz = weights[b, p] * (np.eye(V)[y] - np.exp(log_softmax))
        d_hidden[b, predictors[b, p]] += head @ dz
        d_head += np.outer(h, dz)
    return logps, d_hidden, d_head


def weighted_sum(chunk_size):
    def f(hidden, head, predictors, targets, weights):
        logps = token_logps(hidden, head, predictors, targets, chunk_size=chunk_size)
        return jnp.sum(logps * weights), logps

    return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_value_and_gradients_are_those_of_log_softmax(inputs, chunk_size):
    (_, logps), (d_hidden, d_head) = jax.jit(weighted_sum(chunk_size))(*inputs)
    expected = oracle(*inputs)
    assert logps.dtype == jnp.float32 and logps.shape == (B, P)
    for found, wanted in zip((logps, d_hidden, d_head), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_nothing_is_asked_for(inputs, chunk_size):
    asked = (x[:, :0] for x in inputs[2:])
    (_, logps), gradients = jax.jit(weighted_sum(chunk_size))(*inputs[:2], *asked)
    assert logps.shape == (B, 0)
    assert not any(g.any() for g in gradients)


def test_large_logits_stay_finite(inputs):
    hidden, head, *rest = inputs
    (_, logps), gradients = weighted_sum(2)(1e4 * hidden, head, *rest)
    expected, *_ = oracle(1e4 * hidden, head, *rest)
    np.testing.assert_allclose(logps, expected, rtol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_states_give_float32_sums(inputs):
    hidden, head, *rest = inputs
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    head = jnp.asarray(head, jnp.bfloat16).astype(jnp.float32)
    (_, logps), (d_hidden, d_head) = weighted_sum(2)(hidden, head, *rest)
    expected, _, d_head_expected = oracle(hidden, head, *rest)
    assert d_hidden.dtype == jnp.bfloat16
    assert logps.dtype == d_head.dtype == jnp.float32
    np.testing.assert_allclose(logps, expected, rtol=0, atol=2e-6)
    # Each of the four chunks' shares is rounded to bfloat16, half of 2^-8 relative;
    # their sum is not.
    atol = 4 * 2**-9 * np.abs(d_head_expected).max()
    np.testing.assert_allclose(d_head, d_head_expected, rtol=0, atol=atol)


def subjaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from subjaxprs(inner)


def test_no_array_with_a_vocabulary_axis_exceeds_a_chunk():
    # Sizes that no other product of axes equals, so that shapes identify themselves.
    B, T, D, V, P, C = 2, 53, 3, 101, 48, 4
    args = (
        jnp.zeros((B, T, D)),
        jnp.zeros((D, V)),
        jnp.zeros((B, P), jnp.int32),
        jnp.zeros((B, P), jnp.int32),
        jnp.zeros((B, P)),
    )
    closed = jax.make_jaxpr(weighted_sum(C))(*args)
    shapes = {
        variable.aval.shape
        for jaxpr in subjaxprs(closed.jaxpr)
        for equation in jaxpr.eqns
        for variable in (*equation.invars, *equation.outvars)
        if V in getattr(variable.aval, "shape", ())
    }
    assert (B, C, V) in shapes  # the search looks into the scan
    largest = max(np.prod(s) for s in shapes if D not in s)
    assert largest == B * C * V
    # And so in what XLA makes of it.
    hlo = jax.jit(weighted_sum(C)).lower(*args).compile().as_text()
    for size in (T, P, P // C):
        for shape in (
            f"[{B},{size},{V}]",
            f"[{size},{B},{V}]",
            f"[{size},{B},{C},{V}]",
        ):
            assert shape not in hlo


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)])
def test_every_mesh_gives_the_same(inputs, sizes):
    (_, expected), expected_gradients = jax.jit(weighted_sum(3))(*inputs)
    devices = jax.devices()[: int(np.prod(sizes))]
    types = (AxisType.Explicit,) * 3
    names = ("data", "fsdp", "tensor")
    with jax.set_mesh(jax.make_mesh(sizes, names, axis_types=types, devices=devices)):
        head = jax.reshard(inputs[1], jax.P(None, "tensor"))  # vocabulary sharded
        hidden = jax.reshard(inputs[0], jax.P(("data", "fsdp"), None, None))
        (_, logps), gradients = jax.jit(weighted_sum(3))(hidden, head, *inputs[2:])
        assert jax.typeof(logps).sharding.spec[0] == ("data", "fsdp")
        assert jax.typeof(gradients[1]).sharding.spec[1] == "tensor"
    np.testing.assert_allclose(logps, expected, rtol=0, atol=2e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def distributions(hidden, head, predictors):
    """Log-probabilities [B, P, V] at every predictor, in float64."""
    rows = np.asarray(hidden, np.float64)[np.arange(B)[:, None], predictors]
    return log_softmax(rows @ np.asarray(head, np.float64), axis=-1)


def test_collisions_are_the_chance_of_drawing_a_token_twice(inputs):
    hidden, head, predictors, targets, _ = inputs
    found = token_statistics(
        ("logps", "collisions"), hidden, head, predictors, targets, chunk_size=3
    )
    table = distributions(hidden, head, predictors)
    expected = np.log(np.square(np.exp(table)).sum(-1))
    np.testing.assert_allclose(found["collisions"], expected, atol=2e-6)
    alone = token_logps(hidden, head, predictors, targets, chunk_size=3)
    # Another program, whose sums may be fused otherwise: four roundings, of 2^-21 each,
    # of logits and log-probs of up to 14 nats.
    np.testing.assert_allclose(found["logps"], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("soft_cap", [0, -1.0, np.nan])
def test_a_soft_cap_that_is_none_is_refused(inputs, soft_cap):
    with pytest.raises(ValueError, match="soft_cap .*: must be above 0"):
        token_logps(*inputs[:4], soft_cap=soft_cap)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_entropies_and_their_gradient(inputs, soft_cap):
    hidden, head, predictors, targets, weights = inputs

    def summed(hidden):
        found = token_statistics(
            ("logps", "entropies"),
            *(hidden, head, predictors, targets),
            chunk_size=3,
            soft_cap=soft_cap,
        )
        return jnp.sum(found["entropies"] * weights), found

    gradient, found = jax.jit(jax.grad(summed, has_aux=True))(hidden)
    rows = np.asarray(hidden, np.float64)[np.arange(B)[:, None], predictors]
    z, slope = rows @ np.asarray(head, np.float64), 1.0
    if soft_cap is not None:
        z = soft_cap * np.tanh(z / soft_cap)
        slope = 1 - (z / soft_cap) ** 2
    table = log_softmax(z, axis=-1)
    entropies = -(np.exp(table) * table).sum(-1)
    at = (np.arange(B)[:, None], np.arange(P), targets)
    assert found.keys() == {"logps", "entropies"}
    for name, expected in {"logps": table[at], "entropies": entropies}.items():
        np.testing.assert_allclose(found[name], expected, atol=3e-6)
    # d H / d z_v = - pi(v) (log pi(v) + H)
    slopes = -np.exp(table) * (table + entropies[..., None]) * slope
    slopes = (slopes * weights[..., None]) @ head.T
    expected = np.zeros(hidden.shape)
    for b, p in np.ndindex(B, P):
        expected[b, predictors[b, p]] += slopes[b, p]
    np.testing.assert_allclose(gradient, expected, atol=3e-6)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_soft_cap_bounds_logits_and_slopes(inputs, chunk_size):
    hidden, head, predictors, targets, weights = inputs

    def summed(hidden, head):
        logps = token_logps(
            hidden, head, predictors, targets, chunk_size=chunk_size, soft_cap=2.0
        )
        return jnp.sum(logps * weights)

    def plainly(hidden, head):
        rows = jnp.take_along_axis(hidden, predictors[..., None], axis=1)
        z = 2.0 * jnp.tanh(rows @ head / 2.0)
        logps = jax.nn.log_softmax(z, axis=-1)
        logps = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(logps * weights)

    found = jax.jit(jax.value_and_grad(summed, (0, 1)))(hidden, head)
    expected = jax.jit(jax.value_and_grad(plainly, (0, 1)))(hidden, head)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
    jax.tree.map(close, found, expected)


def test_divergence_from_the_reference_and_its_gradient(inputs):
    hidden, head, predictors, targets, weights = inputs
    rng = np.random.default_rng(1)
    other, other_head = (
        (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32) for x in (hidden, head)
    )

    def summed(hidden):
        found = token_statistics(
            ("logps", "reference_logps", "kls"),
            *(hidden, head, predictors, targets),
            others={"reference": (other, other_head)},
            chunk_size=3,
        )
        return jnp.sum(found["kls"] * weights), found

    gradient, found = jax.jit(jax.grad(summed, has_aux=True))(hidden)
    policy = distributions(hidden, head, predictors)
    reference = distributions(other, other_head, predictors)
    at = (np.arange(B)[:, None], np.arange(P), targets)
    kls = (np.exp(reference) * (reference - policy)).sum(-1)
    values = {"logps": policy[at], "reference_logps": reference[at], "kls": kls}
    assert found.keys() == values.keys()
    for name, expected in values.items():
        np.testing.assert_allclose(found[name], expected, atol=3e-6)
    # d KL(ref || pi) / d logits = pi - ref
    slopes = weights[..., None] * ((np.exp(policy) - np.exp(reference)) @ head.T)
    expected = np.zeros(hidden.shape)
    for b, p in np.ndindex(B, P):
        expected[b, predictors[b, p]] += slopes[b, p]
    np.testing.assert_allclose(gradient, expected, atol=3e-6)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)])
def test_distributions_on_a_sharded_vocabulary(inputs, sizes):
    hidden, head, predictors, targets, _ = inputs
    asked = (predictors, targets)
    both = lambda h, w, p, t: (
        token_statistics(("logps", "collisions"), h, w, p, t, chunk_size=3),
        token_statistics(
            ("logps", "reference_logps", "kls"),
            *(h, w, p, t),
            others={"reference": (2 * h, w)},
            chunk_size=3,
        ),
    )
    expected = jax.jit(both)(hidden, head, *asked)
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        place = lambda x: jax.device_put(np.tile(x, (2,) + (1,) * (x.ndim - 1)), rows)
        columns = jax.NamedSharding(mesh, jax.P(None, "tensor"))
        found = jax.jit(both)(
            place(hidden), jax.device_put(head, columns), *map(place, asked)
        )
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(np.asarray(ours)[:B], one, atol=2e-6)
