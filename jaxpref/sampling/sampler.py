"""A batched sampler with a key-value cache, compiled once per shape.

Axes: B rows, T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models import Model, Params
from jaxpref.models.functional import Cache
from jaxpref.models.layout import SPECS, reshard
from jaxpref.models.logprobs import logits as project_to_logits
from jaxpref.sampling.selection import Select, greedy, likely_sample, sample


def left_pad(
    prompts: Sequence[Sequence[int]], length: int | None = None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Prompts as one array, padded on the left with 0.

    Args:
        prompts: token ids of each prompt, none of them empty.
        length: the width T (default: the longest prompt).  A fixed width saves
            compilations.

    Returns:
        Tokens and lengths, int32.

    Raises:
        InputError: if a prompt is empty or longer than `length`.
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
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """Samples a continuation of every prompt.

    Each token is drawn from softmax(logits / temperature), restricted to the `top_k`
    most likely tokens and then to the smallest set of most likely ones whose
    probability reaches `top_p` (Holtzman et al. 2020, arXiv:1904.09751).  Ties with the
    last of these are included.  Compiles once for each shape, `max_new_tokens`, number
    of stop tokens, and kind of selection (greedy, plain, or filtered sampling).

    Args:
        model: the model.
        params: its parameters.
        prompts: padded on the left (see `left_pad`); under a mesh, B is a multiple of
            data * fsdp.
        lengths: the number of real tokens in each prompt.
        key: a random key.
        max_new_tokens: N.
        temperature: 0 chooses the most likely token and ignores top_k and top_p.
        top_k: None allows all tokens.
        top_p: in (0, 1]; 1 allows all tokens.
        stop_tokens: a row ends at the first of these tokens.

    Returns:
        New tokens, int32, padded on the right with 0, and their number in each row,
        int32, including the stop token.

    Raises:
        InputError: if an option is out of range, or B does not fit the mesh.
    """
    vocabulary = model.architecture.vocab_size
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
    if temperature == 0:
        select = greedy()
    elif top_k is None and top_p == 1:
        select = sample(temperature)
    else:
        select = likely_sample(temperature, min(top_k or vocabulary, vocabulary), top_p)
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    return decode(
        model,
        params,
        prompts,
        lengths,
        key,
        select,
        stops,
        max_new_tokens=max_new_tokens,
    )


def lower(
    model: Model,
    params: Params,
    prompts: Any,
    lengths: Any,
    key: Any,
    *,
    max_new_tokens: int,
) -> jax.stages.Lowered:
    """Lowers `generate` for plain sampling, without compiling it.

    Takes the same arguments, or `jax.ShapeDtypeStruct`s instead of arrays.
    """
    select = jax.eval_shape(lambda: sample(1.0))
    stops = jax.ShapeDtypeStruct((1,), jnp.int32)
    return decode.lower(
        model,
        params,
        prompts,
        lengths,
        key,
        select,
        stops,
        max_new_tokens=max_new_tokens,
    )


def _check(holds: bool, found: str, wanted: str) -> None:
    if not holds:
        raise InputError(f"sampling: {found}; give {wanted}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the decoding loop."""

    step: Int[Array, ""]
    """New tokens so far."""
    cache: Cache
    """The model's cache of the prompts and the new tokens."""
    hidden: Float[Array, "B 1 D"]
    """The hidden states that predict the next tokens."""
    tokens: Int[Array, "B N"]
    """New tokens; 0 if not yet decoded."""
    counts: Int[Array, " B"]
    """Number of new tokens in each row, including stop tokens."""
    done: Bool[Array, " B"]
    """Whether each row has reached a stop token."""


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def decode(
    model: Model,
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: PRNGKeyArray,
    select: Select,
    stop_tokens: Int[Array, " stops"],
    *,
    max_new_tokens: int,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """`generate` with tokens chosen by `select(logits, key)`."""
    B, T = prompts.shape
    prompts, lengths = reshard(prompts, SPECS.tokens), reshard(lengths, SPECS.rows)
    # Cast once instead of in every step.
    dtype = model.numerics.compute_dtype
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    head = model.head(params)

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: DecodeState) -> DecodeState:
        # Sorting needs the whole vocabulary on one device; rows stay sharded.
        soft_cap = model.architecture.logit_soft_cap
        logits = project_to_logits(state.hidden, head, soft_cap)[:, 0]
        step_key = jax.random.fold_in(key, state.step)
        chosen = select(reshard(logits, SPECS.tokens), step_key)
        token = jnp.where(state.done, 0, chosen).astype(jnp.int32)
        at = (0, state.step)
        hidden, cache = model.decode(params, token[:, None], state.cache)
        return DecodeState(
            step=state.step + 1,
            cache=cache,
            hidden=hidden,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
            counts=state.counts + ~state.done,
            done=state.done | jnp.any(token[:, None] == stop_tokens, axis=-1),
        )

    # The last token is decoded too, although its result is unused: one more slot in
    # the cache avoids a special case.
    cache = model.empty_cache(B, T + max_new_tokens)
    hidden, cache = model.prefill(params, prompts, lengths, cache)
    zeros = reshard(jnp.zeros((B, max_new_tokens), jnp.int32), SPECS.tokens)
    start = DecodeState(
        step=jnp.int32(0),
        cache=cache,
        hidden=hidden[:, -1:],
        tokens=zeros,
        counts=zeros[:, 0],
        done=zeros[:, 0] != 0,
    )
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.tokens, end.counts
