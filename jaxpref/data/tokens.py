"""The tokens of an example, and how answers with prompts of their own share them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from jaxpref.data.records import Example

SAME_TOKENS = "chosen and rejected are identical once tokenized and cut"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenized example, and counts of what was cut."""

    prompt: list[int]
    """What the prompts of all completions begin with; the whole prompt if they share
    it."""
    completions: list[list[int]]
    prompt_cut: bool
    completions_cut: int
    traces_cut: int = 0
    turns_dropped: bool = False
    side_prompts: tuple[list[int], ...] = ()
    """The rest of each completion's prompt; empty if all share the whole prompt."""
    masks: tuple[list[bool], ...] = ()
    """Which tokens of each completion are trained on; empty if all are."""


def tokenize_sides(
    examples: Sequence[Example],
    places: Sequence[str],
    tokenize: Callable[[list[Example], list[str]], list[Tokens | str]],
) -> list[Tokens | str]:
    """Tokenizes examples, some of whose completions have prompts of their own.

    These are rendered and cut each by itself, since nothing makes them alike.

    Args:
      examples: the examples.
      places: "file row n" of each, for errors.
      tokenize: `(examples, places) -> tokens` of examples with one prompt.
    """
    alone = [
        [example.alone(side) for side in range(len(example.completions))]
        if example.own_prompts
        else [example]
        for example in examples
    ]
    of_sides = [place for place, own in zip(places, alone, strict=True) for _ in own]
    found = iter(tokenize([one for own in alone for one in own], of_sides))
    return [
        _joined([next(found) for _ in own]) if example.own_prompts else next(found)
        for example, own in zip(examples, alone)
    ]


def _joined(sides: Sequence[Tokens | str]) -> Tokens | str:
    """The tokens of answers that were tokenized one by one."""
    for side in sides:
        if isinstance(side, str):
            return side
    read: list[Tokens] = [side for side in sides if not isinstance(side, str)]
    prompts = [side.prompt for side in read]
    completions = [side.completions[0] for side in read]
    if len(read) == 2 and prompts[0] == prompts[1] and completions[0] == completions[1]:
        return SAME_TOKENS
    shared = shared_start(prompts)
    return Tokens(
        prompt=prompts[0][:shared],
        completions=completions,
        side_prompts=tuple(prompt[shared:] for prompt in prompts),
        prompt_cut=any(side.prompt_cut for side in read),
        completions_cut=sum(side.completions_cut for side in read),
        traces_cut=sum(side.traces_cut for side in read),
        turns_dropped=any(side.turns_dropped for side in read),
    )


def shared_start(lists: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all lists begin."""
    same = (len(set(tokens)) == 1 for tokens in zip(*lists))
    return sum(itertools.takewhile(bool, same))
