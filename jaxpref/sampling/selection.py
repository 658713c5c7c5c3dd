"""How the next token is chosen: functions `select(logits [B, V], keys [B]) -> tokens`.

Each row has a random key of its own, so a token does not depend on the other rows.  A
function is a `jax.tree_util.Partial`, so its parameters are data: changing the
temperature does not recompile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpref.errors import InputError

Logits = Float[Array, "B V"]
Tokens = Int[Array, " B"]
Keys = PRNGKeyArray
"""One key for each row, [B]."""
Select = Callable[[Logits, Keys], Tokens]
BLOCK = 256
"""Tokens whose probabilities are summed first in `draw`."""


def select_by(
    temperature: float, top_k: int | None, top_p: float, vocabulary: int
) -> Partial:
    """The selection with these options; see `generate`.

    Raises:
        InputError: if an option is out of range.
    """
    check(temperature >= 0, f"temperature is {temperature}", "a number >= 0")
    check(0 < top_p <= 1, f"top_p is {top_p}", "a number in (0, 1]")
    check(top_k is None or top_k >= 1, f"top_k is {top_k}", "an integer >= 1, or None")
    if temperature == 0:
        return greedy()
    if top_k is None and top_p == 1:
        return sample(temperature)
    return likely_sample(temperature, min(top_k or vocabulary, vocabulary), top_p)


def check(holds: bool, found: str, wanted: str) -> None:
    """Raises InputError unless an option is in its range."""
    if not holds:
        raise InputError(f"sampling: {found}; give {wanted}")


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


def draw(keys: Keys, logits: Logits) -> Tokens:
    """Samples from softmax(logits): first a block of tokens, and then one of them.

    Two random numbers for each row take much less time than one for each token.

    Args:
        keys: a key for each row.
        logits: -inf for tokens that are not allowed.
    """
    B, V = logits.shape
    p = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,), p.dtype))(keys)
    block = _inverse(jnp.sum(p, axis=-1), u[:, 0])
    within = jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _inverse(within, u[:, 1])


def _inverse(p: Float[Array, "B n"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first i whose p_1 + ... + p_i exceeds the share u of the sum."""
    sums = jnp.cumsum(p, axis=-1)
    reached = sums > u[:, None] * sums[:, -1:]
    # Rounding may reach the share at a token of probability 0, or not at all.
    return jnp.argmax(jnp.where(p > 0, 1 + reached, 0), axis=-1)


def _greedy(logits: Logits, keys: Keys) -> Tokens:
    return jnp.argmax(logits, axis=-1)


def _sample(temperature: jax.Array, logits: Logits, keys: Keys) -> Tokens:
    return draw(keys, logits / temperature)


def _likely_sample(
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    logits: Logits,
    keys: Keys,
) -> Tokens:
    return draw(keys, filter_likely(logits / temperature, top_k, top_p))
