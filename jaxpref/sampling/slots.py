"""The state of answers in progress, as pure functions: start, insert, advance.

A slot holds one answer.  Slots do not depend on each other: they may be at different
positions of their answers, and a finished one can be given another prompt.

The random key of a token is a function of a base key, the numbers of its prompt and
sample, and its place in the answer alone:

    fold_in(fold_in(fold_in(key, prompt), sample), place)

so the same tokens are drawn in every slot, with every number of slots, as far as the
logits are the same.

Axes: B slots, M prompts, R new rows, T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpref.models import cache as caches
from jaxpref.models.layout import SPECS, on_mesh, platform, reshard
from jaxpref.models.quantized import Quantized
from jaxpref.models.stacks import unstacked
from jaxpref.sampling.mixture import LanguageModel, Mixture, next_logits
from jaxpref.sampling.selection import Select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Answers in progress."""

    cache: caches.Cache | tuple[caches.Cache, ...]
    """The prompts and the new tokens, except for the last one; one cache for each model
    of a mixture."""
    ids: Int[Array, "B 2"]
    """The numbers of prompt and sample, which determine the random keys."""
    limits: Int[Array, " B"]
    """Maximum number of new tokens; 0 for a slot that is not in use."""
    tokens: Int[Array, "B N"]
    """New tokens; 0 after the last one."""
    counts: Int[Array, " B"]
    """Number of new tokens, with the stop token."""
    logps: Float[Array, "B N"]
    """The model's own log-probabilities of the new tokens, in nats, float32 or wider;
    0 after the last one."""
    ended: Bool[Array, " B"]
    """Whether the last token is a stop token."""

    @property
    def done(self) -> Bool[Array, " B"]:
        """Which slots need no further tokens."""
        return self.ended | (self.counts >= self.limits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are chosen."""

    key: PRNGKeyArray
    """The base key."""
    select: Select
    """See `selection`."""
    stop_tokens: Int[Array, " stops"]
    """The tokens that end an answer."""


def prepare(model: LanguageModel, params: Any) -> Any:
    """The parameters as decoding reads them, converted once instead of in every step.

    They are in the compute dtype and, on CPU, in one stack per layer; see `unstacked`.
    """
    if isinstance(model, Mixture):
        own = tuple(map(prepare, model.models, params.params))
        return params._replace(params=own)
    dtype = model.numerics.compute_dtype
    is_quantized = lambda w: isinstance(w, Quantized)
    cast = lambda w: w if is_quantized(w) else w.astype(dtype)
    params = jax.tree.map(cast, params, is_leaf=is_quantized)
    return unstacked(params) if platform() == "cpu" else params


def empty(
    model: LanguageModel, params: Any, batch: int, length: int, *, max_new_tokens: int
) -> Slots:
    """`batch` slots that are not in use, for texts of at most `length` tokens.

    Args:
        model: the model.
        params: from `prepare`.
        batch: B.
        length: maximum tokens of a prompt and its answer.
        max_new_tokens: N.
    """
    cache = model.empty_cache(params, batch, length)
    zeros = jnp.zeros(batch, jnp.int32)
    return _new(model, cache, jnp.zeros((batch, 2), jnp.int32), zeros, max_new_tokens)


def start(
    model: LanguageModel,
    params: Any,
    rule: Rule,
    prompts: Any,
    lengths: Any,
    ids: Int[Array, "R 2"],
    limits: Int[Array, " R"],
    *,
    of: Int[Array, " R"] | None = None,
    max_new_tokens: int,
) -> Slots:
    """The first token of each answer; the cache has T slots.

    A prompt is computed once, however many answers it has.

    Args:
        model: the model.
        params: from `prepare`.
        rule: how tokens are chosen.
        prompts: int [M, T], padded on the right; of a mixture whose models have prompts
            of their own, a tuple of these.
        lengths: int [M], the number of real tokens in each prompt, at least 1; or a
            tuple of these.
        ids: see `Slots`.
        limits: see `Slots`.
        of: the prompt of each answer (default: one answer for each prompt).
        max_new_tokens: N.
    """
    hidden, cache = model.prefill(params, prompts, lengths)
    if of is not None:
        hidden = jax.tree.map(lambda x: caches.rows_of(x, of, SPECS.hidden), hidden)
        cache = caches.take(cache, of)
    slots = _new(model, cache, ids, limits, max_new_tokens)
    return _append(model, params, rule, slots, hidden)


def insert(slots: Slots, new: Slots, rows: Int[Array, " R"]) -> Slots:
    """The slots, with new answers in place of some.

    Args:
        slots: B slots.
        new: R answers, whose cache has at most as many slots.
        rows: where each of them goes; those with a number >= B are dropped.
    """
    return caches.insert(slots, new, rows)


def take(slots: Slots, rows: Int[Array, " R"]) -> Slots:
    """The slots with the given numbers."""
    return caches.take(slots, rows)


def advance(
    model: LanguageModel,
    params: Any,
    rule: Rule,
    slots: Slots,
    steps: Int[Array, ""] | int,
    done: Int[Array, ""] | int,
) -> Slots:
    """Up to `steps` more tokens of each answer, until `done` slots are done.

    The cache must have slots for them.
    """

    def unfinished(carry) -> Bool[Array, ""]:
        step, slots = carry
        return (step < steps) & (jnp.sum(slots.done) < done)

    def step(carry):
        step, slots = carry
        places = jnp.arange(slots.tokens.shape[1])
        last = jnp.where(places == slots.counts[:, None] - 1, slots.tokens, 0)
        hidden, cache = model.decode(
            params, jnp.sum(last, axis=1), slots.cache, ~slots.done
        )
        slots = dataclasses.replace(slots, cache=cache)
        return step + 1, _append(model, params, rule, slots, hidden)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots))[1]


def _new(model: LanguageModel, cache: Any, ids, limits, max_new_tokens: int) -> Slots:
    wide = jnp.promote_types(model.numerics.compute_dtype, jnp.float32)
    zeros = lambda *shape, dtype=jnp.int32: reshard(
        jnp.zeros((ids.shape[0], *shape), dtype), P(*SPECS.tokens[: 1 + len(shape)])
    )
    return Slots(
        cache=cache,
        ids=reshard(ids.astype(jnp.int32), SPECS.tokens),
        limits=reshard(limits.astype(jnp.int32), SPECS.rows),
        tokens=zeros(max_new_tokens),
        counts=zeros(),
        logps=zeros(max_new_tokens, dtype=wide),
        ended=zeros(dtype=bool),
    )


def _append(
    model: LanguageModel, params: Any, rule: Rule, slots: Slots, hidden: Any
) -> Slots:
    """The slots with the tokens that follow the states `hidden`."""
    logits, own = next_logits(model, params, hidden)
    chosen, logps = _choose(logits, own, slots.ids, slots.counts, rule)
    done = slots.done
    here = (jnp.arange(slots.tokens.shape[1]) == slots.counts[:, None]) & ~done[:, None]
    stops = jnp.any(chosen[:, None] == rule.stop_tokens, axis=-1)
    return dataclasses.replace(
        slots,
        tokens=jnp.where(here, chosen[:, None], slots.tokens),
        counts=slots.counts + ~done,
        logps=jnp.where(here, logps[:, None], slots.logps),
        ended=slots.ended | (stops & ~done),
    )


def _choose(
    logits: jax.Array, own: jax.Array, ids, counts, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """A token for each row, and its log-probability under the model's `own` logits."""

    def choose(logits, own, ids, counts, key, select):
        def token_key(numbers, place):
            folded = jax.random.fold_in(jax.random.fold_in(key, numbers[0]), numbers[1])
            return jax.random.fold_in(folded, place)

        chosen = select(logits, jax.vmap(token_key)(ids, counts)).astype(jnp.int32)
        of_chosen = jnp.take_along_axis(own, chosen[:, None], axis=-1)[:, 0]
        return chosen, of_chosen - jax.nn.logsumexp(own, axis=-1)

    arrays = logits, own, ids, counts, rule.key, rule.select
    rows, tokens = on_mesh(SPECS.rows), on_mesh(SPECS.tokens)
    if rows is None:
        return choose(*arrays)
    mapped = jax.shard_map(
        choose,
        in_specs=(tokens, tokens, tokens, rows, P(), P()),
        out_specs=(rows, rows),
        check_vma=False,
    )
    return mapped(*arrays)
