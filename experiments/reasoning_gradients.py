"""Exact sums over the traces of `reasoning_world.py`: probabilities and gradients.

For a pair (x, y_w, y_l) and beta, with pi the policy and ref the reference:

    marginal   l_m = -ls(h_m), h = beta log[pi(y_w|x) / ref(y_w|x)] - the same for y_l,
               pi(y|x) = sum_r pi(r, y|x); its gradient is the true gradient
    trace      l_t = the same with pi(r, y|x) of sampled r_w, r_l ~ ref(r|x, y)
    empty      l_e = the same with pi(y|x, empty trace)

By Fisher's identity grad log pi(y|x) = sum_r pi(r|x, y) grad log pi(r, y|x).  So the
gradients of all joint log-probs, [R, P] per side, give the marginal gradient and the
mean and variance of the trace gradient as finite sums.  If the policy equals the
reference, h is 0 for every trace and the trace gradient is unbiased; otherwise it is
biased.

Completions end with EOS, as in training; bare answers are enumerated without it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments import reasoning_world as world
from jaxpref import losses
from jaxpref.data import encode_prompt

CHUNK = 8
"""Prompts whose traces are scored at the same time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    """The world's texts as token ids; texts of one kind have the same length.

    Compared by identity, so that it can be a static argument of `jax.jit`.
    """

    prompts: np.ndarray
    """int32 [N, 5], BOS first."""
    traces: np.ndarray
    """int32 [R, 6], from marker to marker."""
    empty: np.ndarray
    """int32 [2], the markers only."""
    answers: np.ndarray
    """int32 [M]."""
    eos: int


def read_language(tokenizer: Any) -> Language:
    """All prompts, traces, and answers as token ids."""

    def ids(texts, bos: bool):
        rows = [encode_prompt(tokenizer, text) for text in texts]
        return np.array(rows, np.int32)[:, 0 if bos else 1 :]

    opened, closed = world.MARKERS
    return Language(
        prompts=ids(world.all_prompts(), True),
        traces=ids([opened + t + closed for t in world.all_traces()], False),
        empty=ids([opened + closed], False)[0],
        answers=ids(world.NUMBERS, False)[:, 0],
        eos=tokenizer.eos_token_id,
    )


# ---- probabilities -----------------------------------------------------------------


def completion_logps(model, params, tokens, *, start: int) -> jax.Array:
    """Log-probs [N] of tokens[:, start:] given the tokens before; tokens [N, T]."""
    logps = jax.nn.log_softmax(model.logits(params, tokens)[:, start - 1 : -1])
    targets = tokens[:, start:, None]
    return jnp.sum(jnp.take_along_axis(logps, targets, axis=-1)[..., 0], axis=1)


def trace_sequences(language: Language, prompt, answer) -> jax.Array:
    """[R, T]: the prompt with every trace, the answer, and EOS; both are indices."""
    count = len(language.traces)
    row = lambda ids: jnp.broadcast_to(ids, (count, *ids.shape))
    end = jnp.stack([jnp.asarray(language.answers)[answer], language.eos])
    prompt = jnp.asarray(language.prompts)[prompt]
    return jnp.concatenate([row(prompt), language.traces, row(end)], axis=1)


def empty_sequences(language: Language, pairs) -> np.ndarray:
    """[N, 2, T']: pairs [N, 3] with an empty trace, the answers, and EOS."""
    prompts, answers = language.prompts[pairs[:, 0]], language.answers[pairs[:, 1:]]
    shape = answers.shape
    parts = (
        np.broadcast_to(prompts[:, None], (*shape, prompts.shape[1])),
        np.broadcast_to(language.empty, (*shape, len(language.empty))),
        answers[..., None],
        np.full((*shape, 1), language.eos, np.int32),
    )
    return np.concatenate(parts, axis=2)


def answer_logps(model, params, language: Language, prompts):
    """Both log pi(r, y|x) [n, R, M] and log pi(y|x, empty trace) [n, M], no EOS."""
    prompts = np.asarray(prompts)
    chunks = np.pad(prompts, (0, -len(prompts) % CHUNK)).reshape(-1, CHUNK)
    parts = [_answer_logps(model, params, language, c) for c in chunks]
    joint, empty = (np.concatenate(part)[: len(prompts)] for part in zip(*parts))
    return joint, empty


@functools.partial(jax.jit, static_argnums=(0, 2))
def _answer_logps(model, params, language, prompts):
    def one(prompt):
        ids = jnp.asarray(language.prompts)[prompt]
        count = len(language.traces)
        heads = jnp.broadcast_to(ids, (count, len(ids)))
        tokens = jnp.concatenate([heads, language.traces], axis=1)
        logps = jax.nn.log_softmax(model.logits(params, tokens))
        start = len(ids)
        said = jnp.take_along_axis(
            logps[:, start - 1 : -1], tokens[:, start:, None], axis=-1
        )
        last = logps[:, -1, language.answers]
        alone = jnp.concatenate([ids, language.empty])[None]
        empty = jax.nn.log_softmax(model.logits(params, alone)[0, -1])
        return jnp.sum(said[..., 0], axis=1)[:, None] + last, empty[language.answers]

    return jax.lax.map(one, prompts)


def expected_rewards(joint, empty, rewards) -> dict[str, float]:
    """Exact mean gold reward over prompts, with and without traces, and their mass.

    Args:
      joint: log pi(r, y|x), [n, R, M].
      empty: log pi(y|x, empty trace), [n, M].
      rewards: [n, M].

    Returns:
      `reward` and `empty_reward`, with texts outside the language counted as 0, and
      `language`: the probability that trace and answer are in it.
    """
    marginal, empty = np.exp(joint).sum(axis=1), np.exp(empty)
    return {
        "reward": float((marginal * rewards).sum(axis=1).mean()),
        "empty_reward": float((empty * rewards).sum(axis=1).mean()),
        "language": float(marginal.sum(axis=1).mean()),
    }


# ---- gradients ---------------------------------------------------------------------


class Exact(NamedTuple):
    """Exact gradients for one pair with traces, flattened to [P]."""

    marginal: jax.Array
    """The gradient of l_m."""
    trace_mean: jax.Array
    """E over traces of the gradient of l_t."""
    trace_variance: jax.Array
    """The trace of its covariance matrix."""


def marginal_loss(model, params, language: Language, pair, base_logps, *, beta):
    """l_m of one pair (prompt, chosen, rejected); `base_logps` [2, R] of ref."""
    logps = _joint(model, params, language, pair)
    lse = lambda logps: jax.nn.logsumexp(logps, axis=1)
    return losses.dpo(*lse(logps), *lse(base_logps), beta=beta)


def exact(model, params, language: Language, pairs, base_logps, *, beta) -> Exact:
    """`Exact` for every pair, with a leading axis of pairs.

    Args:
      model: the functional model.
      params: the policy's parameters.
      language: the world's texts.
      pairs: int [N, 3]: prompt, chosen and rejected answer.
      base_logps: log ref(r, y|x) of both sides, [N, 2, R].
      beta: DPO's beta.
    """
    flat, unravel = ravel_pytree(params)

    def logp(flat, row):
        start = language.prompts.shape[1]
        return completion_logps(model, unravel(flat), row[None], start=start)[0]

    def one(pair, base):
        rows = pair_sequences(language, pair)
        both = jax.vmap(jax.vmap(jax.value_and_grad(logp), (None, 0)), (None, 0))
        logps, grads = both(flat, rows)
        ratios = logps - base
        gap = lambda x: beta * (x[0] - x[1])
        lse = lambda x: jax.nn.logsumexp(x, axis=1)
        now, then = jax.nn.softmax(logps), jax.nn.softmax(base)

        def marginal():
            sides = jnp.einsum("sr,srp->sp", now, grads)
            return -jax.nn.sigmoid(-gap(lse(logps) - lse(base))) * gap(sides)

        # The loss of every pair of traces, each weighted by its reference probability.
        weight = jax.nn.sigmoid(-beta * (ratios[0][:, None] - ratios[1][None]))
        drawn = then[0][:, None] * then[1][None]
        sides = [drawn * weight, (drawn * weight).T]
        mean = -gap([w.sum(axis=1) @ g for w, g in zip(sides, grads)])
        squares = jnp.sum(grads**2, axis=-1)
        lengths = squares[0][:, None] + squares[1][None]
        lengths -= 2 * jnp.matmul(grads[0], grads[1].T, precision="highest")
        second = beta**2 * jnp.sum(drawn * weight**2 * lengths)
        return Exact(marginal(), mean, second - jnp.sum(mean**2))

    return jax.lax.map(lambda xs: one(*xs), (jnp.asarray(pairs), base_logps))


def drawn_gradients(model, params, rows, base_logps, *, start: int, beta) -> jax.Array:
    """Gradients of the DPO loss for given completions, [..., P].

    Args:
      model: the functional model.
      params: the policy's parameters.
      rows: int [..., 2, T]: the chosen and the rejected sequence.
      base_logps: [..., 2], log-probs under the reference.
      start: number of tokens of the prompt.
      beta: DPO's beta.
    """
    flat, unravel = ravel_pytree(params)

    def loss(flat, rows, base):
        logps = completion_logps(model, unravel(flat), rows, start=start)
        return losses.dpo(*logps, *base, beta=beta)

    one = jax.grad(loss)
    for _ in rows.shape[:-2]:
        one = jax.vmap(one, (None, 0, 0))
    return one(flat, rows, base_logps)


def trace_logps(model, params, language: Language, pairs) -> jax.Array:
    """Joint log pi(r, y|x) with EOS, both sides of pairs [N, 3]: [N, 2, R]."""
    one = lambda pair: _joint(model, params, language, pair)
    return jax.lax.map(one, jnp.asarray(pairs))


def pair_sequences(language: Language, pair) -> jax.Array:
    """[2, R, T]: both sides of a pair (prompt, chosen, rejected), every trace."""
    sides = [trace_sequences(language, pair[0], answer) for answer in pair[1:]]
    return jnp.stack(sides)


def _joint(model, params, language: Language, pair) -> jax.Array:
    rows = pair_sequences(language, pair)
    start = language.prompts.shape[1]
    flat = rows.reshape(-1, rows.shape[-1])
    logps = completion_logps(model, params, flat, start=start)
    return logps.reshape(rows.shape[:2])
