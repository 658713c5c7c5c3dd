"""A language model as a judge: which of two answers does it say is better?"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from jaxpref.data.records import Example, text_of
from jaxpref.errors import InputError
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.weights import Weights, is_reward, resolve_weights
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.models import ModelOptions, score

QUESTION = """\
Below are a question and two answers. Which answer is better{principle}? Reply with \
the letter A or B only.

[Question]
{prompt}

[Answer A]
{a}

[Answer B]
{b}
"""
"""What the judge is asked."""
LETTERS = ("A", "B")


@dataclasses.dataclass(frozen=True)
class Judge:
    """How often an answer wins against the other answers to its prompt.

        r(y) = mean over y' != y of 1/2 [p(A | A = y, B = y') + p(B | A = y', B = y)]

    p is the probability of a letter among the two.  The two orders cancel a preference
    of the judge for the first or the second answer (Zheng et al. 2023,
    arXiv:2306.05685).
    """

    name: str
    """As the user wrote it."""
    weights: Weights
    options: ModelOptions
    principle: str = ""
    """What makes an answer better, in words (RewardAnything, arXiv:2506.03637)."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`.

        Raises:
          InputError: if a prompt has one answer only.
        """
        return [wins(first) for first in self.first_is_better(answered)]

    def first_is_better(
        self, answered: Sequence[Answered]
    ) -> list[Float[np.ndarray, "K K"]]:
        """p(A | A = answer i, B = answer j) of each prompt, [i, j]; NaN if i is j.

        Raises:
          InputError: if a prompt has one answer only.
        """
        for one in answered:
            if len(one.texts) < 2:
                raise InputError(
                    f"{one.place}: has one answer, but --reward {self.name} compares "
                    "answers; give at least two"
                )
        asked = [list(self._asked(one)) for one in answered]
        options = self.options
        if options.max_length is None:  # a question must be read whole
            length = read_architecture(self.weights.folder).context_length
            options = dataclasses.replace(options, max_length=length)
        logps = iter(
            score(
                self.weights, "policy_logps", [*itertools.chain(*asked)], options,
                self.name, allow_cut=False,
            )
        )  # fmt: skip
        found = []
        for one in answered:
            count = len(one.texts)
            table = np.full((count, count), np.nan)
            for pair in itertools.permutations(range(count), 2):
                table[pair] = expit(np.subtract(*next(logps)))
            found.append(table)
        return found

    def _asked(self, answered: Answered) -> Iterator[Answered]:
        """A question for each ordered pair of answers, with both letters as answers."""
        principle = f" by this principle: {self.principle}" if self.principle else ""
        for a, b in itertools.permutations(answered.texts, 2):
            parts = {
                "{principle}": principle,
                "{prompt}": _text(answered.example),
                "{a}": a,
                "{b}": b,
            }
            question = "".join(
                parts.get(part, part) for part in _split(QUESTION, [*parts])
            )
            # Rendered as what a user asks, if the judge has a chat template.
            yield Answered(Example(question, LETTERS), {}, answered.place, as_user=True)


def wins(first: Float[np.ndarray, "K K"]) -> Float[np.ndarray, " K"]:
    """The reward of each answer: the mean over the others and both orders.

    Args:
      first: p(A | A = answer i, B = answer j), [i, j]; the diagonal is not read.
    """
    both = (first + 1 - first.T) / 2
    np.fill_diagonal(both, 0)
    return both.sum(axis=1) / (len(first) - 1)


def judge_of(folder: str, options: ModelOptions, *, principle: str) -> Judge:
    """The judge in a folder, or with a Hub ID.

    Raises:
      InputError: if it is a reward model.
    """
    weights = resolve_weights(folder, None)
    if is_reward(weights):
        raise InputError(
            f"--reward judge:{folder}: is a reward model; write --reward {folder}"
        )
    return Judge(f"judge:{folder}", weights, options, principle)


def _text(example: Example) -> str:
    """The prompt as the judge reads it."""
    prompt = example.prompt
    if isinstance(prompt, str) or len(prompt) == 1:
        return prompt if isinstance(prompt, str) else text_of(prompt[0])
    return "\n\n".join(f"{turn['role']}: {text_of(turn)}" for turn in prompt)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The text in parts, with each mark as a part; marks inside answers stay."""
    for mark in marks:
        text = text.replace(mark, f"\0{mark}\0")
    return text.split("\0")
