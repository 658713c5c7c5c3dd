"""A batched sampler with a key-value cache, compiled once for a shape."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpref.errors import InputError
from jaxpref.models import Model
from jaxpref.models.config import SPECS, place
from jaxpref.models.logprobs import project


def left_pad(prompts: Sequence[Sequence[int]], length: int | None = None):
    """Prompts as one array, padded on the left with 0.

    Args:
        prompts: token ids of each prompt, none of them empty.
        length: the width T, which if fixed saves compiles; by default the longest.

    Returns:
        Tokens, int32 [B, T], and lengths, int32 [B].

    Raises:
        InputError: an empty prompt, or one that is longer than `length`.
    """
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths, default=0) if length is None else length
    for row, n in enumerate(lengths, start=1):
        if not 1 <= n <= width:
            raise InputError(
                f"prompts, row {row}: {n} tokens; a prompt needs between 1 and {width}"
            )
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32)


def generate(
    model: Model,
    params,
    prompts,
    lengths,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
):
    """Samples a continuation of every prompt.

    Each token is drawn from softmax(logits / temperature), cut to the `top_k` most
    likely tokens and then to the smallest set of most likely ones whose probability
    reaches `top_p` (Holtzman et al. 2020, arXiv:1904.09751); tokens that tie with the
    last one kept are kept.  Compiles once for each shape, `max_new_tokens`, number of
    stop tokens and choice of greedy, plain or filtered sampling; the rest is data.

    Args:
        model: the model.
        params: its parameters.
        prompts: int [B, T], padded on the left (see `left_pad`); under a mesh, B is a
            multiple of data * fsdp.
        lengths: int [B], real tokens of each prompt.
        key: a random key.
        max_new_tokens: N.
        temperature: 0 takes the most likely token, whatever top_k and top_p are.
        top_k: None keeps all tokens.
        top_p: in (0, 1]; 1 keeps all tokens.
        stop_tokens: a row ends with the first of these that it draws.

    Returns:
        New tokens, int32 [B, N], padded on the right with 0, and their count in each
        row, int32 [B], the stop token included.

    Raises:
        InputError: an option out of its range, or B does not suit the mesh.
    """
    vocabulary = model.config.vocab_size
    _check(temperature >= 0, f"temperature is {temperature}", "a number >= 0")
    _check(0 < top_p <= 1, f"top_p is {top_p}", "a number in (0, 1]")
    _check(top_k is None or top_k >= 1, f"top_k is {top_k}", "an integer >= 1, or None")
    _check(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}", "at least 1")
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
    _check(
        prompts.shape[0] % rows == 0,
        f"a batch of {prompts.shape[0]} prompts",
        f"a multiple of the mesh's data * fsdp = {rows} (repeat some prompts)",
    )
    return _generate(
        model,
        params,
        prompts,
        lengths,
        key,
        jnp.float32(temperature or 1.0),
        jnp.int32(min(top_k or vocabulary, vocabulary)),
        jnp.float32(top_p),
        jnp.asarray(tuple(stop_tokens), jnp.int32),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        filtered=top_k is not None or top_p < 1,
    )


def lower(
    model: Model, params, prompts, lengths, key, *, max_new_tokens: int
) -> jax.stages.Lowered:
    """The program of `generate` where every token may be drawn, not yet compiled.

    Takes the same, or `jax.ShapeDtypeStruct`s in the place of arrays.
    """
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype)
    return _generate.lower(
        model,
        params,
        prompts,
        lengths,
        key,
        scalar(jnp.float32),
        scalar(jnp.int32),
        scalar(jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        max_new_tokens=max_new_tokens,
        greedy=False,
        filtered=False,
    )


def _check(holds: bool, found: str, wanted: str) -> None:
    if not holds:
        raise InputError(f"sampling: {found}; give {wanted}")


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "greedy", "filtered")
)
def _generate(
    model: Model,
    params,
    prompts,
    lengths,
    key,
    temperature,
    top_k,
    top_p,
    stop_tokens,
    *,
    max_new_tokens: int,
    greedy: bool,
    filtered: bool,
):
    B, T = prompts.shape
    prompts, lengths = place(prompts, SPECS.tokens), place(lengths, SPECS.rows)
    # Cast once, not in every step.
    params = jax.tree.map(lambda w: w.astype(model.config.compute_dtype), params)
    head = model.head(params)

    def draw(hidden, step):
        # Sorting needs the whole vocabulary on one device; rows stay spread.
        logits = place(project(hidden, head)[:, 0], SPECS.tokens)
        if greedy:
            return jnp.argmax(logits, axis=-1)
        logits = logits / temperature
        if filtered:
            logits = keep_likely(logits, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits)

    def more(state):
        step, _, _, _, _, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state):
        step, cache, hidden, tokens, counts, done = state
        token = jnp.where(done, 0, draw(hidden, step)).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        counts = counts + ~done
        done = done | jnp.any(token[:, None] == stop_tokens, axis=-1)
        hidden, cache = model.decode(params, token[:, None], cache)
        return step + 1, cache, hidden, tokens, counts, done

    # The last token drawn is decoded too, and not used: one more slot, no special case.
    cache = model.empty_cache(B, T + max_new_tokens)
    hidden, cache = model.prefill(params, prompts, lengths, cache)
    zeros = place(jnp.zeros((B, max_new_tokens), jnp.int32), SPECS.tokens)
    counts, done = zeros[:, 0], zeros[:, 0] != 0
    state = (jnp.int32(0), cache, hidden[:, -1:], zeros, counts, done)
    _, _, _, tokens, counts, _ = jax.lax.while_loop(more, advance, state)
    return tokens, counts


def keep_likely(logits, top_k, top_p):
    """Logits [B, V], -inf outside the `top_k` and then `top_p` most likely tokens."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    ranks = jnp.arange(logits.shape[-1])
    ranked = jnp.where(ranks < top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # Of many tokens the rounded sum can reach 1 before the last.
    nucleus = (before < top_p) | (top_p >= 1)
    kept = jnp.where(nucleus & (ranks < top_k), ranked, jnp.inf)
    return jnp.where(logits >= jnp.min(kept, axis=-1, keepdims=True), logits, -jnp.inf)
