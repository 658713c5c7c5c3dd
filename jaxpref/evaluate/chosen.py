"""Rewards of samples, and the samples that are kept by them."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.sources import ListSource
from jaxpref.evaluate.sample_options import AlignmentOptions
from jaxpref.evaluate.sampled import Sampled
from jaxpref.rewards import Reward, read_answered
from jaxpref.rewards.rules import last_number
from jaxpref.sampling.choice import best_of_majority, best_of_n, majority_vote
from jaxpref.sampling.similarity import unigram_f1

Texts = Sequence[Sequence[str]]
"""For each prompt, the texts of its answers."""
RewardOfTexts = Callable[[Texts], list[Float[np.ndarray, " n"]]]
"""The reward of each answer; NaN if it has none."""


def reward_of_texts(
    reward: Reward, prompts: Sequence[data.Prompt], options: data.RecordOptions
) -> RewardOfTexts:
    """A reward as a function of new answers to the same prompts.

    It reads a record as `jaxpref score` would, after `jaxpref sample` wrote it.
    """
    # These are of `sample`, whatever the file had.
    written = ("prompt", "completions", "tools", "chat_template_kwargs")
    ignored = tuple(x for x in options.ignore_fields if x not in written)
    read = data.RecordOptions(template=options.template, ignore_fields=ignored)

    def rewards(texts: Texts) -> list[Float[np.ndarray, " n"]]:
        records = [
            {**prompt.record, "completions": [{"text": text} for text in own]}
            for prompt, own in zip(prompts, texts, strict=True)
            if own
        ]
        found = iter(reward(read_answered(ListSource(records, "prompts"), read)))
        return [next(found) if own else np.empty(0) for own in texts]

    return rewards


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the answers to a prompt."""

    place: int
    """Its index."""
    scores: Float[np.ndarray, " n"] | None
    """Of all answers, rewards or similarities; None if none were computed."""

    def scored(self, answers: Sequence[Sampled]) -> list[Sampled]:
        """The answers with their scores."""
        if self.scores is None:
            return [*answers]
        return [
            dataclasses.replace(one, score=x if math.isfinite(x) else None)
            for one, x in zip(answers, self.scores.tolist(), strict=True)
        ]


def chosen(
    texts: Texts, options: AlignmentOptions, rewards: RewardOfTexts | None
) -> list[Choice]:
    """The answer that is kept, for each prompt.

    Args:
      texts: the answers.
      options: how one is chosen; `pick` is not None.
      rewards: of answers; `best` and `best-of-majority` choose by them.
    """
    if options.pick == "majority":  # rewards may be those of --decode
        voted = [_answers(own, options) for own in texts]
        return [Choice(majority_vote(own), None) for own in voted]
    if options.pick == "mbr":
        scores = [np.mean(unigram_f1(own), axis=1) for own in texts]
    else:
        assert rewards is not None  # see `AlignmentOptions.check`
        scores = rewards(texts)
    each = zip(texts, scores, strict=True)
    return [Choice(_place(own, x, options), x) for own, x in each]


def _place(
    texts: Sequence[str], scores: Float[np.ndarray, " n"], options: AlignmentOptions
) -> int:
    """The index of the answer with the best score."""
    if options.pick == "best-of-majority":
        answers = _answers(texts, options)
        least = options.min_frequency
        return best_of_majority(answers, scores, min_frequency=least)[0]
    return best_of_n(scores)


def _answers(texts: Sequence[str], options: AlignmentOptions) -> list[Hashable | None]:
    """What each text answers; None if it gives no answer."""
    if options.vote_on == "number":
        return [last_number(text) for text in texts]
    return [" ".join(text.split()).casefold() or None for text in texts]
