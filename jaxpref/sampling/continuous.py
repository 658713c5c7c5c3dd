"""`answer_all`: many prompts through a few slots, each refilled as soon as it is free.

The programs are those of `slots`, compiled for a bounded number of shapes: prompts are
padded to a power of two, and so is the length of the cache, which follows the longest
text in progress.

Axes: B slots, R answers that start together, M prompts of theirs, T prompt tokens, S
slots of the cache, N new tokens.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxpref.models.cache import resized
from jaxpref.models.layout import num_parts
from jaxpref.sampling import slots as functions
from jaxpref.sampling.batch import check_rows, pad
from jaxpref.sampling.mixture import LanguageModel
from jaxpref.sampling.selection import check
from jaxpref.sampling.slots import Rule, Slots
from jaxpref.sharding import ROWS, fetched

STEPS = 32
"""Maximum number of tokens between two checks by the host.  It also checks when enough
slots are done for a refill, so this only limits how long finished answers and Ctrl-C
wait."""
REFILLS = 8
"""A refill is one in this many slots, so that several prompts are computed at once."""
SHRINKING = 4
"""When no prompt is left, and one in this many slots is in use, the others go."""
NARROWEST = 32
"""The smallest width of prompts."""
SHORTEST = 128
"""The smallest length of the cache."""


class Answer(NamedTuple):
    """The answer to one prompt."""

    tokens: list[int]
    """With the stop token, if there is one."""
    logp: float
    """See `Answers.logps`; under the model alone if it has guides."""
    ended: bool
    """Whether it ends with a stop token."""
    token_logps: tuple[float, ...] = ()
    """The log-probability of each token; their sum is `logp`."""


class Request(NamedTuple):
    """A prompt to be answered once."""

    tokens: Sequence[int]
    """At least one."""
    ids: tuple[int, int] = (0, 0)
    """The numbers of prompt and sample, which determine the random keys."""
    max_new_tokens: int = 1
    """Maximum number of tokens of the answer."""
    of_guides: tuple[Sequence[int], ...] = ()
    """The prompts of the guides of a `Mixture`; by default they read `tokens`."""

    @property
    def texts(self) -> tuple[tuple[int, ...], ...]:
        """The prompts of the model and of its guides."""
        return tuple(map(tuple, (self.tokens, *self.of_guides)))

    @property
    def length(self) -> int:
        """The tokens of the longest of them."""
        return max(map(len, self.texts))


_MODEL, _SHAPE = "model", ("batch", "length", "max_new_tokens")
_prepare = jax.jit(functions.prepare, static_argnames=_MODEL)
_empty = jax.jit(functions.empty, static_argnames=(_MODEL, *_SHAPE))
_start = jax.jit(functions.start, static_argnames=(_MODEL, "max_new_tokens"))
_advance = jax.jit(functions.advance, static_argnames=_MODEL, donate_argnames="slots")
_insert = jax.jit(functions.insert, donate_argnames="slots")
_take = jax.jit(functions.take)


@functools.partial(jax.jit, static_argnames="length")
def _resize(slots: Slots, length: int) -> Slots:
    return dataclasses.replace(slots, cache=resized(slots.cache, length))


def answer_all(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Request],
    rule: Rule,
    *,
    batch_size: int,
    largest: Request | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answers every prompt, and yields each answer as it ends, with its number.

    A slot whose answer has ended is given the next prompt while the others go on, so a
    batch does not wait for its longest answer.  Prompts of similar lengths start
    together, and of these the ones with the largest `max_new_tokens` first.  Requests
    with the same prompt start together, and their prompt is computed once.  When no
    prompt is left, the number of slots follows that of the answers in progress.

    The tokens of an answer are a function of its prompt, its `ids`, and the rule, as
    far as the logits are the same.  Their last bits may depend on `batch_size` and on
    the other prompts, because these change shapes and thereby the order of sums.

    Several processes that share a mesh answer the prompts together: all must ask for
    the same ones, and each gets all answers.

    Args:
        model: the model, or a `Mixture` of it and guides.
        params: its parameters.
        prompts: in any order.
        rule: how tokens are chosen; see `selection.select_by`.
        batch_size: B, the number of slots; under a mesh, a multiple of data *
            fsdp (* expert).
        largest: a request with the longest prompt and answer that calls will have, so
            that all of them use the same programs (default: those of `prompts`).

    Raises:
        InputError: if a prompt is empty, or B does not fit the mesh.
    """
    _check(prompts, batch_size)
    if not prompts:
        return
    shapes = _shapes(prompts, batch_size, largest)
    params = _prepare(model, params)
    queue = _in_order(prompts, shapes)
    length = shapes.length(shapes.widest)
    slots = _empty(model, params, batch_size, length, max_new_tokens=shapes.new_tokens)
    owners = np.full(batch_size, -1)  # the prompt in each slot; -1 for none
    texts = np.zeros(batch_size, np.int32)  # tokens of each row in the cache
    while queue or np.any(owners >= 0):
        while queue and np.sum(owners < 0) >= min(shapes.refill, len(queue)):
            group = _next(queue, prompts, shapes)
            rows = np.flatnonzero(owners < 0)[: len(group)]
            owners[rows], texts[rows] = group, [prompts[n].length for n in group]
            new = _started(model, params, rule, [prompts[n] for n in group], shapes)
            width = shapes.width(int(texts[rows].max()))
            slots, length = _fitted(slots, length, shapes, max(texts.max(), width))
            slots = _insert(slots, new, shapes.padded(rows, batch_size))
        fewer = 0 if queue else _fewer(len(owners))
        if np.sum(owners >= 0) <= fewer:
            rows = np.argsort(owners < 0, kind="stable")[:fewer]  # those in use first
            slots = _take(slots, jnp.asarray(rows, jnp.int32))
            owners, texts, fewer = owners[rows], texts[rows], _fewer(fewer)
        slots, length = _fitted(slots, length, shapes, texts.max() + 1)
        steps = min(STEPS, length - texts.max())
        idle = np.sum(owners < 0)
        done = idle + min(shapes.refill, len(queue)) if queue else len(owners) - fewer
        slots = _advance(model, params, rule, slots, int(steps), int(done))
        found = fetched(dataclasses.replace(slots, cache=None))
        for row in np.flatnonzero(owners >= 0).tolist():
            number, count = int(owners[row]), int(found.counts[row])
            texts[row] = prompts[number].length + count - 1
            if found.ended[row] or count == prompts[number].max_new_tokens:
                owners[row], texts[row] = -1, 0
                yield number, _answer(found, int(row))


class _Shapes(NamedTuple):
    """The shapes of the programs."""

    refill: int
    """R."""
    prompts: int
    """M."""
    new_tokens: int
    """N."""
    widest: int
    """The largest width T of prompts."""
    longest: int
    """The largest length S of the cache."""

    def width(self, tokens: int) -> int:
        """The width T of a prompt."""
        return min(_power_of_two(tokens, NARROWEST), self.widest)

    def length(self, tokens: int) -> int:
        """The length S of the cache for texts of so many tokens."""
        return min(_power_of_two(tokens, SHORTEST), self.longest)

    def padded(self, rows: np.ndarray, beyond: int) -> Int[Array, " R"]:
        """The slots of a group of prompts; `beyond` for prompts that are repeated."""
        return jnp.array([*rows, *[beyond] * (self.refill - len(rows))], jnp.int32)


def _power_of_two(tokens: int, least: int) -> int:
    return max(least, 1 << (int(tokens) - 1).bit_length())


def _check(prompts: Sequence[Request], batch_size: int) -> None:
    check_rows(batch_size)
    for number, prompt in enumerate(prompts, start=1):
        shortest = min(map(len, prompt.texts))
        check(shortest > 0, f"prompt {number} is empty", "at least one token")
        most = prompt.max_new_tokens
        check(most >= 1, f"max_new_tokens of prompt {number} is {most}", "at least 1")


def _fewer(rows: int) -> int:
    """The next smaller number of slots; 0 if there is none."""
    fewer = rows // SHRINKING
    return fewer if fewer % num_parts(ROWS) == 0 else 0


def _shapes(
    prompts: Sequence[Request], batch_size: int, largest: Request | None
) -> _Shapes:
    whole = lambda x: -(-x // NARROWEST) * NARROWEST
    bounds = [*prompts, *([] if largest is None else [largest])]
    widest = whole(max(prompt.length for prompt in bounds))
    texts = max(prompt.length + prompt.max_new_tokens - 1 for prompt in bounds)
    parts = num_parts(ROWS)
    split = lambda x: -(-max(x, 1) // parts) * parts
    refill = split(batch_size // REFILLS)
    # With `largest`, other calls may have another share of distinct prompts.
    distinct = len({x.texts for x in prompts} if largest is None else prompts)
    return _Shapes(
        refill=refill,
        prompts=split(-(-refill * distinct // len(prompts))),
        new_tokens=max(prompt.max_new_tokens for prompt in bounds),
        widest=widest,
        longest=max(widest, whole(texts)),
    )


def _in_order(prompts: Sequence[Request], shapes: _Shapes) -> collections.deque[int]:
    """The numbers of the requests in the order in which they start."""
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    most: dict[tuple[tuple[int, ...], ...], int] = collections.defaultdict(int)
    for number, prompt in enumerate(prompts):
        texts = prompt.texts
        first.setdefault(texts, number)
        most[texts] = max(most[texts], prompt.max_new_tokens)

    def place(number: int) -> tuple[int, ...]:
        prompt, texts = prompts[number], prompts[number].texts
        width = shapes.width(prompt.length)
        return -width, -most[texts], first[texts], -prompt.max_new_tokens

    return collections.deque(sorted(range(len(prompts)), key=place))


def _next(
    queue: collections.deque[int], prompts: Sequence[Request], shapes: _Shapes
) -> list[int]:
    """Takes up to R requests with at most M different prompts from the queue."""
    group, texts = [], set()
    while queue and len(group) < shapes.refill:
        texts.add(prompts[queue[0]].texts)
        if len(texts) > shapes.prompts:
            break
        group.append(queue.popleft())
    return group


def _started(
    model: LanguageModel, params: Any, rule: Rule, group: list[Request], shapes: _Shapes
) -> Slots:
    """The first tokens of the answers to a group of requests.

    Prompts and answers are repeated to fill the shapes.
    """
    group = group + group[-1:] * (shapes.refill - len(group))
    width = shapes.width(max(prompt.length for prompt in group))
    texts, of = [prompt.texts for prompt in group], None
    if shapes.prompts < shapes.refill:
        distinct = list(dict.fromkeys(texts))
        of = jnp.array([distinct.index(text) for text in texts], jnp.int32)
        texts = distinct + distinct[-1:] * (shapes.prompts - len(distinct))
    padded = [pad(of_model, width) for of_model in zip(*texts, strict=True)]
    return _start(
        model,
        params,
        rule,
        *(padded[0] if len(padded) == 1 else zip(*padded)),
        jnp.array([prompt.ids for prompt in group], jnp.int32),
        jnp.array([prompt.max_new_tokens for prompt in group], jnp.int32),
        of=of,
        max_new_tokens=shapes.new_tokens,
    )


def _answer(found: Slots, row: int) -> Answer:
    """The answer in a slot, from arrays on the host."""
    count = int(found.counts[row])
    tokens, logps = found.tokens[row, :count], found.logps[row, :count]
    ended = bool(found.ended[row])
    return Answer(tokens.tolist(), float(logps.sum()), ended, tuple(logps.tolist()))


def _fitted(
    slots: Slots, length: int, shapes: _Shapes, tokens: int
) -> tuple[Slots, int]:
    """The slots with a cache for texts of so many tokens, and its length."""
    needed = shapes.length(tokens)
    return (slots if needed == length else _resize(slots, needed)), needed
