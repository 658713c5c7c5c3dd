"""The answers to all requests, in one of the ways of `--decode`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.evaluate.aligned import RewardOfAnswers, qalign_answers
from jaxpref.evaluate.chosen import RewardOfTexts
from jaxpref.evaluate.guides import SampledModels
from jaxpref.evaluate.sample_options import AlignmentOptions
from jaxpref.evaluate.transferred import transfer_q_answers
from jaxpref.sampling import Answer, Request, Rule
from jaxpref.sampling.candidates import likely_tokens
from jaxpref.sampling.mixture import LanguageModel
from jaxpref.sampling.slots import prepare

Draw = Callable[..., dict[int, Answer]]
"""`evaluate.draw.draw` with its batch size and the answers that are kept."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are decoded."""

    models: SampledModels
    """The model, its guides, and the baseline of Transfer Q*."""
    model: LanguageModel
    """`models`, built."""
    rule: Rule
    """How tokens are chosen."""
    batch_size: int
    """Answers in progress."""
    seed: int
    """Of all draws."""


def decoded(
    decoding: Decoding,
    draw: Draw,
    requests: Sequence[Request],
    rewards: RewardOfAnswers | None,
    options: AlignmentOptions,
) -> list[Answer]:
    """An answer to each request.

    Args:
      decoding: see `Decoding`.
      draw: see `Draw`.
      requests: one for each answer.
      rewards: of answers, for ways that read them.
      options: the way and its options.

    Raises:
      InputError: if a model cannot be read, or the way needs a single process.
    """
    models, model, rule = decoding.models, decoding.model, decoding.rule
    if options.decode == "sample" or rewards is None:
        load = lambda: models.load(model)
        found = draw(model, load, rule, dict(enumerate(requests)))
        return [found[n] for n in range(len(requests))]
    params = models.load(model)
    drawn = functools.partial(draw, model, lambda: params)
    asked = rule, requests, rewards, options
    if options.decode == "qalign":
        return qalign_answers(drawn, *asked, seed=decoding.seed)
    if jax.process_count() > 1:
        raise InputError("--decode transfer-q: runs in one process; start a single one")
    params = jax.jit(prepare, static_argnums=0)(model, params)
    if (baseline := models.baseline) is not None:
        other = baseline.build(model.numerics)
        others = baseline.load(other)
        drawn = functools.partial(draw, other, lambda: others)

    def likely(texts: Sequence[Request], k: int, width: int) -> Any:
        k, size = min(k, model.architecture.vocab_size), decoding.batch_size
        return likely_tokens(model, params, texts, k, batch_size=size, width=width)

    return transfer_q_answers(
        likely, drawn, *asked, seed=decoding.seed, own_guides=baseline is None
    )


def reward_of_answers(
    rewards: RewardOfTexts,
    text_of: Callable[[int, Answer], str],
    prompts: int,
    samples: int,
) -> RewardOfAnswers:
    """The reward of single answers, from one of all answers to each prompt.

    Args:
      rewards: see `RewardOfTexts`.
      text_of: the text of an answer to a prompt, by its number.
      prompts: their count.
      samples: the requests of each prompt.
    """

    def of_answers(
        numbers: Sequence[int], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " m"]:
        texts: list[list[str]] = [[] for _ in range(prompts)]
        places = []
        for number, answer in zip(numbers, answers, strict=True):
            own = number // samples
            places.append((own, len(texts[own])))
            texts[own].append(text_of(own, answer))
        found = rewards(texts)
        return np.array([found[own][place] for own, place in places], float)

    return of_answers
