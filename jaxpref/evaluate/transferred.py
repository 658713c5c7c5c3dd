"""Answers by Transfer Q*: each token by the rewards of a baseline's continuations."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxpref.evaluate.aligned import (
    Draw,
    RewardOfAnswers,
    continued,
    joined,
    largest_of,
    step_key,
)
from jaxpref.evaluate.sample_options import AlignmentOptions
from jaxpref.sampling import Answer, Request, Rule
from jaxpref.sampling.choice import mean_of_known
from jaxpref.sampling.transfer_q import Candidates, Tokens, transfer_q

Likely = Callable[
    [Sequence[Request], int, int], tuple[np.ndarray, np.ndarray, np.ndarray]
]
"""`likely(texts, k, width)`; see `sampling.candidates.likely_tokens`."""


def transfer_q_answers(
    likely: Likely,
    draw: Draw,
    rule: Rule,
    requests: Sequence[Request],
    rewards: RewardOfAnswers,
    options: AlignmentOptions,
    *,
    seed: int,
    own_guides: bool,
) -> list[Answer]:
    """An answer to each request.

    Args:
      likely: the next tokens of the model.
      draw: draws answers of the baseline.
      rule: how the baseline's tokens are chosen, and which tokens end an answer.
      requests: one for each answer.
      rewards: see `RewardOfAnswers`.
      options: candidates, rollouts and beta.
      seed: of the draws.
      own_guides: whether the baseline is the model, with its guides.
    """
    largest, count = largest_of(requests), len(requests)
    limit = max(request.max_new_tokens for request in requests)
    stops = set(np.asarray(rule.stop_tokens).tolist())
    logps: dict[tuple[int, Tokens], float] = {}  # of the model, of the last token

    def answer(number: int, text: Tokens) -> Answer:
        own = tuple(logps[number, text[: n + 1]] for n in range(len(text)))
        return Answer(list(text), float(sum(own)), text[-1] in stops, own)

    def candidates(numbers: Sequence[int], texts: Sequence[Tokens]) -> Candidates:
        asked = [continued(requests[n], x) for n, x in zip(numbers, texts, strict=True)]
        tokens, mixed, own = likely(asked, options.candidates, largest.length)
        for row, (n, text) in enumerate(zip(numbers, texts, strict=True)):
            for token, logp in zip(tokens[row].tolist(), own[row].tolist()):
                logps[n, (*text, token)] = logp
        return tokens, mixed

    def values(
        step: int, numbers: Sequence[int], texts: Sequence[Tokens]
    ) -> Float[np.ndarray, " m"]:
        """The mean reward of the rollouts; the reward itself if nothing follows.

        Rollouts whose reward could not be computed are left out of the mean.
        """
        size = options.candidates * options.rollouts
        asked: dict[int, Request] = {}
        of: list[list[int]] = []  # the draws after each text
        ranks: collections.Counter[int] = collections.Counter()
        for n, text in zip(numbers, texts, strict=True):
            first = n * size + ranks[n] * options.rollouts
            ranks[n] += 1
            whole = text[-1] in stops or len(text) == limit
            places = [] if whole else range(first, first + options.rollouts)
            rest = continued(requests[n], text)
            if not own_guides:
                rest = rest._replace(of_guides=())
            of.append([step * count * size + x for x in places])
            for number, x in zip(of[-1], places):
                asked[number] = rest._replace(ids=(requests[n].ids[0], x))
        of_step = dataclasses.replace(rule, key=step_key(seed, step))
        title = f"token {step + 1} of {limit}"
        drawn = draw(of_step, asked, largest=largest, title=title)
        owners, answers = [], []
        for n, text, places in zip(numbers, texts, of, strict=True):
            head = answer(n, text)
            ends = [joined(head, drawn[x]) for x in places] or [head]
            owners += [n] * len(ends)
            answers += ends
        found = iter(rewards(owners, answers).tolist())
        return np.array(
            [mean_of_known([next(found) for _ in places or [0]]) for places in of]
        )

    texts = transfer_q(
        count,
        candidates,
        values,
        lambda text: text[-1] in stops,
        max_new_tokens=limit,
        alpha=options.beta,
        seed=seed,
        ids=[request.ids for request in requests],
    )
    return [answer(n, text) for n, text in enumerate(texts)]
