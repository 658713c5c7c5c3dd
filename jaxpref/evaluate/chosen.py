"""Rewards of samples, and the samples that are kept by them."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.sources import ListSource
from jaxpref.evaluate.sample_options import AlignmentOptions
from jaxpref.rewards import Reward, read_answered
from jaxpref.rewards.rules import last_number
from jaxpref.sampling.choice import best_of_majority, best_of_n, majority_vote

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


def chosen(
    texts: Texts, options: AlignmentOptions, rewards: RewardOfTexts | None
) -> list[int]:
    """The index of the answer that is kept, for each prompt.

    Args:
      texts: the answers.
      options: how one is chosen; `pick` is not None.
      rewards: for ways that read them.
    """
    found = rewards(texts) if rewards else [np.zeros(len(own)) for own in texts]
    return [_one(own, r, options) for own, r in zip(texts, found, strict=True)]


def _one(
    texts: Sequence[str], rewards: Float[np.ndarray, " n"], options: AlignmentOptions
) -> int:
    answers = [_answer(text, options.vote_on) for text in texts]
    match options.pick:
        case "majority":
            return majority_vote(answers)
        case "best-of-majority":
            least = options.min_frequency
            return best_of_majority(answers, rewards, min_frequency=least)[0]
        case _:
            return best_of_n(rewards)


def _answer(text: str, vote_on: str) -> Hashable | None:
    """What a text answers; None if it gives no answer."""
    if vote_on == "number":
        return last_number(text)
    return " ".join(text.split()).casefold() or None
