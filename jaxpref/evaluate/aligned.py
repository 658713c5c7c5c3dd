"""Answers of a model by QAlign, with many chains in each batch of the sampler."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.sample_options import AlignmentOptions
from jaxpref.sampling import Answer, Request, Rule
from jaxpref.sampling.qalign import qalign


class Draw(Protocol):
    """Draws answers, or finds those that an earlier start of the command has drawn."""

    def __call__(
        self,
        rule: Rule,
        requests: Mapping[int, Request],
        *,
        largest: Request,
        title: str,
    ) -> dict[int, Answer]:
        """The answer to each request, by its number, which is that of the draw."""
        ...


RewardOfAnswers = Callable[[Sequence[int], Sequence[Answer]], Float[np.ndarray, " C"]]
"""Rewards of answers to the requests with the given numbers."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An answer as a chain sees it."""

    answer: Answer

    def __len__(self) -> int:
        return len(self.answer.tokens)


def qalign_answers(
    draw: Draw,
    rule: Rule,
    requests: Sequence[Request],
    rewards: RewardOfAnswers,
    options: AlignmentOptions,
    *,
    seed: int,
) -> list[Answer]:
    """The last state of a chain for each request.

    Args:
      draw: see `Draw`.
      rule: how tokens are chosen; the target is its distribution, tilted.
      requests: one for each chain.
      rewards: see `RewardOfAnswers`.
      options: steps and beta.
      seed: of the chains.
    """
    count, largest = len(requests), largest_of(requests)

    def propose(
        step: int, chains: Sequence[Tokens], kept: Int[np.ndarray, " C"]
    ) -> list[Tokens]:
        heads = [_head(x.answer, n) for x, n in zip(chains, kept.tolist(), strict=True)]
        asked = {
            step * count + n: continued(request, head.tokens)
            for n, (request, head) in enumerate(zip(requests, heads, strict=True))
        }
        of_step = dataclasses.replace(rule, key=step_key(seed, step))
        title = f"step {step} of {options.steps}"
        found = draw(of_step, asked, largest=largest, title=title)
        return [
            Tokens(joined(head, found[step * count + n]))
            for n, head in enumerate(heads)
        ]

    first = draw(rule, dict(enumerate(requests)), largest=largest, title="sampling")
    states = qalign(
        [Tokens(first[n]) for n in range(count)],
        propose,
        lambda chains: rewards(range(count), [x.answer for x in chains]),
        steps=options.steps,
        beta=options.beta,
        seed=seed,
        ids=[request.ids for request in requests],
    )
    return [x.answer for x in states[-1]]


def largest_of(requests: Sequence[Request]) -> Request:
    """A request that is as large as any for the rest of an answer to one of these."""
    new_tokens = max(request.max_new_tokens for request in requests)
    tokens = max(request.length for request in requests) + new_tokens - 1
    return Request([0] * tokens, max_new_tokens=new_tokens)


def step_key(seed: int, step: int) -> jax.Array:
    """The random key of a step, which no other step and no plain sample uses."""
    return jax.random.key(int(np.random.default_rng([seed, step]).integers(2**31)))


def continued(request: Request, tokens: Sequence[int]) -> Request:
    """The request for the rest of an answer that begins with some tokens."""
    return request._replace(
        tokens=[*request.tokens, *tokens],
        max_new_tokens=request.max_new_tokens - len(tokens),
        of_guides=tuple([*own, *tokens] for own in request.of_guides),
    )


def joined(head: Answer, rest: Answer) -> Answer:
    """An answer from its first tokens and the rest."""
    logps = (*head.token_logps, *rest.token_logps)
    return Answer([*head.tokens, *rest.tokens], float(sum(logps)), rest.ended, logps)


def _head(answer: Answer, count: int) -> Answer:
    logps = tuple(answer.token_logps[:count])
    return Answer(answer.tokens[:count], float(sum(logps)), False, logps)
