"""`generate`: a continuation of every prompt of a batch, as one compiled program.

Axes: B rows, T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.cache import resized
from jaxpref.models.layout import num_parts
from jaxpref.sampling import slots as answers
from jaxpref.sampling.mixture import LanguageModel
from jaxpref.sampling.selection import check, sample, select_by
from jaxpref.sharding import ROWS


class Answers(NamedTuple):
    """Continuations of the prompts of a batch."""

    tokens: Int[Array, "B N"]
    """New tokens, int32, padded on the right with 0."""
    counts: Int[Array, " B"]
    """Their number in each row, int32, with the stop token."""
    logps: Float[Array, " B"]
    """log p(answer | prompt) = sum_t log softmax(logits)[token_t], in nats: the model's
    own distribution, whatever the temperature and the filters of the selection."""
    ended: Bool[Array, " B"]
    """Whether each row ends with a stop token."""


def pad(
    prompts: Sequence[Sequence[int]], length: int | None = None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Prompts as one array, padded on the right with 0.

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
    rows = [list(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    return jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32)


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> Answers:
    """Samples a continuation of every prompt.

    Each token is drawn from softmax(logits / temperature), restricted to the `top_k`
    most likely tokens and then to the smallest set of most likely ones whose
    probability reaches `top_p` (Holtzman et al. 2020, arXiv:1904.09751).  Ties with the
    last of these are included.  Compiles once for each shape, `max_new_tokens`, number
    of stop tokens, and kind of selection (greedy, plain, or filtered sampling).

    The batch ends with its longest answer; `answer_all` does not wait for that.

    Args:
        model: the model, or a `Mixture` of it and guides.
        params: its parameters.
        prompts: padded on the right (see `pad`); under a mesh, B is a multiple of
            data * fsdp (* expert).
        lengths: the number of real tokens in each prompt.
        key: a random key.  The tokens of row b depend on the key, b, and the prompt.
        max_new_tokens: N.
        temperature: 0 chooses the most likely token and ignores top_k and top_p.
        top_k: None allows all tokens.
        top_p: in (0, 1]; 1 allows all tokens.
        stop_tokens: a row ends at the first of these tokens.

    Raises:
        InputError: if an option is out of range, or B does not fit the mesh.
    """
    select = select_by(temperature, top_k, top_p, model.architecture.vocab_size)
    check(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}", "at least 1")
    check_rows(prompts.shape[0])
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    return decode(
        model,
        params,
        prompts,
        lengths,
        answers.Rule(key, select, stops),
        max_new_tokens=max_new_tokens,
    )


def check_rows(batch: int) -> None:
    """Raises InputError if a batch of prompts cannot be split over the mesh."""
    rows = num_parts(ROWS)
    check(
        batch % rows == 0,
        f"a batch of {batch} prompts",
        f"a multiple of the {rows} devices that split the rows (repeat some prompts)",
    )


def lower(
    model: LanguageModel,
    params: Any,
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
    stops: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    rule = answers.Rule(key, select, stops)
    options = dict(max_new_tokens=max_new_tokens)
    return decode.lower(model, params, prompts, lengths, rule, **options)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def decode(
    model: LanguageModel,
    params: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rule: answers.Rule,
    *,
    max_new_tokens: int,
) -> Answers:
    """`generate` with tokens chosen by `rule`."""
    B, T = prompts.shape
    params = answers.prepare(model, params)
    ids = jnp.stack([jnp.arange(B), jnp.zeros(B, jnp.int32)], axis=1)
    found = answers.start(
        model,
        params,
        rule,
        prompts,
        lengths,
        ids,
        jnp.full(B, max_new_tokens),
        max_new_tokens=max_new_tokens,
    )
    # The last token is not in the cache.
    cache = resized(found.cache, T + max_new_tokens - 1)
    found = dataclasses.replace(found, cache=cache)
    found = answers.advance(model, params, rule, found, max_new_tokens, B)
    logps = jnp.sum(found.logps, axis=1)
    return Answers(found.tokens, found.counts, logps, found.ended)
