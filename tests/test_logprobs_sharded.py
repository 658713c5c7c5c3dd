"""Log-probs with the vocabulary spread over devices: exact, and never gathered."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from scipy.special import log_softmax

from jaxpref.models.logprobs import token_logps, token_statistics

# Sizes of which no chunk's array of logits is the smaller one, on any of the meshes:
# [B, C, V] is larger than [B, T, D], than [D, V] and than whatever has no V.  V is four
# times a prime, so a shape with the vocabulary in it is known by its divisor.
B, T, D, V, P, C = 4, 53, 3, 4 * 101, 46, 4

ALONE, TENSOR, ALL = None, (1, 1, 4), (2, 2, 2)
sharded = pytest.mark.parametrize(
    "sizes", [TENSOR, ALL], ids=["tensor 4", "tensor 2, rows over data and fsdp"]
)
alone_and_sharded = pytest.mark.parametrize(
    "sizes", [ALONE, ALL], ids=["no mesh", "tensor 2, rows over data and fsdp"]
)


def logps(hidden, head, other, other_head, predictors, targets):
    return (token_logps(hidden, head, predictors, targets, chunk_size=C),)


def collisions(hidden, head, other, other_head, predictors, targets):
    names = ("logps", "collisions")
    arguments = hidden, head, predictors, targets
    found = token_statistics(names, *arguments, chunk_size=C)
    return tuple(found[name] for name in names)


def kls(hidden, head, other, other_head, predictors, targets):
    # A reference is a constant to whoever trains.
    fixed = jax.lax.stop_gradient((other, other_head))
    names = ("logps", "reference_logps", "kls")
    arguments = hidden, head, predictors, targets
    found = token_statistics(
        names, *arguments, others={"reference": fixed}, chunk_size=C
    )
    return tuple(found[name] for name in names)


functions = pytest.mark.parametrize("function", [logps, collisions, kls])


def value_and_gradients(function):
    """Outputs, and the gradients of a weighted sum of them, of every argument."""

    def summed(hidden, head, weights, *fixed):
        outs = function(hidden, head, *fixed)
        return sum(jnp.sum(w * out) for w, out in zip(weights, outs)), outs

    return jax.jit(jax.grad(summed, argnums=(0, 1), has_aux=True))


def draw(dtype):
    """What the functions take, `weights` of the sum behind `head`."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    predictors = rng.integers(0, T, (B, P))
    predictors[:, -2:] = 0  # unused places repeat a position
    targets = rng.integers(0, V, (B, P))
    # The first and last of every shard, where an offset by one would show.
    edges = [k * V // 4 + d for k in range(4) for d in (0, V // 4 - 1)]
    targets[0, : len(edges)] = edges
    hidden, other = normal(B, T, D), normal(B, T, D)
    head, other_head = normal(D, V), normal(D, V)
    weights = normal(3, B, P)
    return hidden, head, weights, other, other_head, predictors, targets


@contextlib.contextmanager
def on_mesh(sizes, arguments):
    """The arguments laid out as training has them, the mesh set."""
    if sizes is None:
        yield tuple(map(jnp.asarray, arguments))
        return
    mesh = jax.make_mesh(
        sizes,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 3,
        devices=jax.devices()[: int(np.prod(sizes))],
    )
    rows, head = jax.P(("data", "fsdp")), jax.P(None, "tensor")
    weights = jax.P(None, ("data", "fsdp"))
    specs = (rows, head, weights, rows, head, rows, rows)
    with jax.set_mesh(mesh):
        yield tuple(
            jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip(arguments, specs, strict=True)
        )


def oracle(hidden, head, weights, other, other_head, predictors, targets):
    """Outputs of each function and the gradients, from closed forms, in numpy.

    d log pi(y) / dz = e_y - pi;  d log sum pi^2 / dz = 2 pi^2 / sum pi^2 - 2 pi;
    d KL(ref || pi) / dz = pi - ref.
    """
    rows = np.arange(B)[:, None]
    log_p = log_softmax(hidden[rows, predictors] @ head, axis=-1)
    log_r = log_softmax(other[rows, predictors] @ other_head, axis=-1)
    at = (rows, np.arange(P), targets)
    pi, ref = np.exp(log_p), np.exp(log_r)
    squared = np.square(pi).sum(-1, keepdims=True)
    slopes = {
        "logps": np.eye(V)[targets] - pi,
        "collisions": 2 * pi**2 / squared - 2 * pi,
        "kls": pi - ref,
        "reference": np.zeros_like(pi),
    }
    divergence = (ref * (log_r - log_p)).sum(-1)
    outs = {
        logps: {"logps": log_p[at]},
        collisions: {"logps": log_p[at], "collisions": np.log(squared[..., 0])},
        kls: {"logps": log_p[at], "reference": log_r[at], "kls": divergence},
    }

    def gradients(function):
        dz = sum(w[..., None] * slopes[k] for w, k in zip(weights, outs[function]))
        d_hidden = np.zeros_like(hidden)
        np.add.at(d_hidden, (rows, predictors), dz @ head.T)
        d_head = np.einsum("bpd,bpv->dv", hidden[rows, predictors], dz)
        return d_hidden, d_head

    return outs, gradients


@sharded
@functions
def test_values_and_gradients_in_float64(function, sizes):
    with jax.enable_x64(True):
        arguments = draw(np.float64)
        outs, gradients = oracle(*arguments)
        with on_mesh(sizes, arguments) as placed:
            found_gradients, found = value_and_gradients(function)(*placed)
            assert jax.typeof(found_gradients[1]).sharding.spec[1] == "tensor"
        expected = outs[function].values()
        for ours, one in zip(found, expected, strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, one, rtol=1e-11, atol=1e-11)
        for ours, one in zip(found_gradients, gradients(function), strict=True):
            np.testing.assert_allclose(ours, one, rtol=1e-11, atol=1e-11)


# ---- what the compiler makes of it -------------------------------------------------

_ANY = re.compile(r"\b(?:pred|[a-z]+\d+)\[(\d+(?:,\d+)*)\]")
_FLOAT = re.compile(r"\bf\d+\[(\d+(?:,\d+)*)\]")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"
    r"(?:-start)?\("
)


def shapes_in(text, kind=_ANY) -> list[tuple[int, ...]]:
    return [tuple(map(int, found.split(","))) for found in kind.findall(text)]


def of_vocabulary(shape) -> bool:
    return any(size % (V // 4) == 0 for size in shape)


@functools.cache
def compiled_text(function, sizes) -> str:
    """HLO of values and gradients as one device runs it, forward and backward."""
    with on_mesh(sizes, draw(np.float32)) as placed:
        return value_and_gradients(function).lower(*placed).compile().as_text()


# Sizes on one device.
share = lambda sizes: (B // (sizes[0] * sizes[1]), V // sizes[2])


@alone_and_sharded
@functions
def test_nothing_in_the_compiled_program_is_larger_than_a_chunk(function, sizes):
    """On one device, of its share: not the comparison with the targets either."""
    rows, columns = share(sizes or (1, 1, 1))
    chunk = rows * C * columns
    # Or the search would prove nothing.
    assert chunk > max(rows * T * D, D * columns, 3 * rows * P)
    text = compiled_text(function, sizes)
    floats = shapes_in(text, _FLOAT)
    assert any(of_vocabulary(shape) for shape in floats)
    assert max(int(np.prod(shape)) for shape in floats) == chunk
    assert max(int(np.prod(shape)) for shape in shapes_in(text)) == chunk


@functions
def test_logits_are_never_gathered(function):
    columns = V // ALL[2]
    text = compiled_text(function, ALL)
    found = [(kind, shapes_in(out)) for out, kind in _COLLECTIVE.findall(text)]
    # The shards' maxima and sums must meet.
    assert any(kind == "all-reduce" for kind, _ in found)
    of_head = {(D, columns), (columns, D)}
    for kind, shapes in found:
        for shape in filter(of_vocabulary, shapes):
            # The head's gradient is summed over rows; nothing else has a V to send.
            assert kind in {"all-reduce", "reduce-scatter"}, (kind, shape)
            assert tuple(size for size in shape if size > 1) in of_head, (kind, shape)


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


@functions
def test_nothing_that_is_traced_is_larger_than_a_chunk(function):
    """Before any fusion: forward and backward, on the whole vocabulary."""
    closed = jax.make_jaxpr(value_and_gradients(function))(*draw(np.float32))
    shapes = {
        variable.aval.shape
        for jaxpr in subjaxprs(closed.jaxpr)
        for equation in jaxpr.eqns
        for variable in (*equation.invars, *equation.outvars)
        if of_vocabulary(getattr(variable.aval, "shape", ()))
    }
    assert (B, C, V) in shapes  # the search looks into the scan
    assert max(int(np.prod(shape)) for shape in shapes) == B * C * V
