"""A few prompts answered, and answers scored, by all devices of a mesh together."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpref.models import Model
from jaxpref.models.layout import SPECS, num_parts, reshard
from jaxpref.models.logprobs import token_logps
from jaxpref.sampling.batch import Answers, generate, pad
from jaxpref.sharding import ROWS, replicated

Tokens = Sequence[Sequence[int]]
Params = Any


def greedy_answers(
    model: Model,
    params: Params,
    prompts: Tokens,
    *,
    mesh: Mesh,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> Answers:
    """The most likely next tokens of each prompt, whole on every device.

    The last prompt fills up the rows, so that there may be more answers than prompts.
    """
    tokens, lengths = _padded(prompts, mesh)
    found = generate(
        model,
        params,
        tokens,
        lengths,
        jax.random.key(0),
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop_tokens=stop_tokens,
    )
    return _everywhere(found)


def answer_logps(
    model: Model,
    params: Params,
    prompts: Tokens,
    answers: Tokens,
    *,
    mesh: Mesh,
    max_new_tokens: int,
) -> Float[np.ndarray, " prompts"]:
    """Log p(answer | prompt), summed over the answer's tokens, in nats.

    Args:
        model: the model.
        params: its parameters.
        prompts: token ids of each prompt, none of them empty.
        answers: those of its answer.
        mesh: the devices.
        max_new_tokens: the most tokens of an answer; sets the shapes.
    """
    most = max(map(len, prompts)) + max_new_tokens
    whole = [
        [*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)
    ]
    tokens, lengths = _padded(whole, mesh, most)
    starts, _ = _padded([[1] * len(prompt) for prompt in prompts], mesh, most)
    starts = jnp.sum(starts, axis=1)
    sums = _sums(model, params, tokens, starts, lengths, count=max_new_tokens)
    return np.asarray(jax.device_get(sums))[: len(prompts)]


@jax.jit
def _everywhere(found: Answers) -> Answers:
    return jax.tree.map(replicated, found)


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _sums(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    count: int,
) -> Float[Array, " B"]:
    """Sums over the tokens from `starts` to `lengths`, on every device."""
    tokens = reshard(tokens, SPECS.tokens)
    places = reshard(starts[:, None] + jnp.arange(count)[None], SPECS.tokens)
    at = jnp.minimum(places, tokens.shape[1] - 1)
    # Under vmap, a gather within a row needs no sharding annotation.
    targets = jax.vmap(lambda row, i: row[i])(tokens, at)
    of_tokens = token_logps(
        model.hidden(params, tokens),
        model.head(params),
        at - 1,
        targets,
        soft_cap=model.architecture.logit_soft_cap,
    )
    inside = places < reshard(lengths, P(ROWS))[:, None]
    return replicated(jnp.sum(jnp.where(inside, of_tokens, 0), axis=1))


def _padded(
    rows: Tokens, mesh: Mesh, length: int | None = None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Rows of tokens on every device; as many as the mesh can divide."""
    missing = -len(rows) % num_parts(ROWS)
    tokens, lengths = pad([*rows, *[rows[-1]] * missing], length)
    everywhere = NamedSharding(mesh, P())
    put = lambda x: jax.device_put(np.asarray(x), everywhere)
    return put(tokens), put(lengths)
