"""How the next token is chosen: functions `select(logits [B, V], key) -> tokens [B]`.

Each is a `jax.tree_util.Partial`, so its parameters are data: changing the temperature
does not recompile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

Logits = Float[Array, "B V"]
Tokens = Int[Array, " B"]
Select = Callable[[Logits, jax.Array], Tokens]


def greedy() -> Partial:
    """The most likely token."""
    return Partial(_greedy)


def sample(temperature: float) -> Partial:
    """Samples from softmax(logits / temperature)."""
    return Partial(_sample, jnp.float32(temperature))


def likely_sample(temperature: float, top_k: int, top_p: float) -> Partial:
    """Samples from the tokens that `filter_likely` allows."""
    return Partial(
        _likely_sample, jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    )


def filter_likely(
    logits: Logits, top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Logits:
    """Logits, -inf outside the `top_k` and then `top_p` most likely tokens."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    ranks = jnp.arange(logits.shape[-1])
    ranked = jnp.where(ranks < top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # With many tokens, the rounded sum can reach 1 before the last one.
    nucleus = (before < top_p) | (top_p >= 1)
    included = jnp.where(nucleus & (ranks < top_k), ranked, jnp.inf)
    lowest = jnp.min(included, axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def _greedy(logits: Logits, key: jax.Array) -> Tokens:
    return jnp.argmax(logits, axis=-1)


def _sample(temperature: jax.Array, logits: Logits, key: jax.Array) -> Tokens:
    return jax.random.categorical(key, logits / temperature)


def _likely_sample(
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    logits: Logits,
    key: jax.Array,
) -> Tokens:
    likely = filter_likely(logits / temperature, top_k, top_p)
    return jax.random.categorical(key, likely)
