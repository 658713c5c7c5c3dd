"""The weights of the layers: stacks of arrays [L, ...], which follow each other."""

import functools
from typing import Any, NamedTuple

import jax

Params = dict[str, Any]


class Run(NamedTuple):
    """Consecutive layers of one stack of parameters, all with the same window."""

    stack: int
    """The number of the stack."""
    first: int
    """The number of the first layer in the stack."""
    start: int
    """The number of the first layer in the model."""
    count: int
    """The number of layers."""
    window: int | None
    """Their sliding window."""


def stacks_of(layers: Any) -> tuple[Params, ...]:
    """The stacks of `params["layers"]`: one, or several that follow each other."""
    return layers if isinstance(layers, tuple) else (layers,)


def num_layers(stack: Params) -> int:
    """The number of layers of a stack."""
    return jax.tree.leaves(stack)[0].shape[0]


def with_weights(layers: Any, attributes: Any) -> list[tuple[Params, Any]]:
    """Each stack of layers with its part of the attributes [L, ...] of all layers."""
    found, start = [], 0
    for stack in stacks_of(layers):
        stop = start + num_layers(stack)
        part = lambda x, start=start, stop=stop: x[start:stop]
        found.append((stack, jax.tree.map(part, attributes)))
        start = stop
    return found


def at_layer(stack: Any, n: Any) -> Any:
    """The arrays of layer n, from arrays [L, ...]."""
    if isinstance(n, int):
        return jax.tree.map(lambda x: x[n], stack)
    at = functools.partial(jax.lax.dynamic_index_in_dim, index=n, keepdims=False)
    return jax.tree.map(at, stack)


def unstacked(params: Params) -> Params:
    """The same parameters with one stack per layer.

    A scan over layers copies the weights of each; decoding on CPU, which does little
    with a weight, is faster without.
    """
    layers = tuple(
        jax.tree.map(lambda x, n=n: x[n : n + 1], stack)
        for stack in stacks_of(params["layers"])
        for n in range(num_layers(stack))
    )
    return params | {"layers": layers}
