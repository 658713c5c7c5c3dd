"""Examples that do not fit: what is cut, in which order, and how much.

Nothing is cut if prompt and answers fit together.  If they do not, a prompt loses
its earliest turns, then the beginning of its last turn: of the question, and of the
results of tools, the longest first.  It is cut until it fits next to the longest answer
or into half of the length, whichever is more.  System turns and the header of a turn
are kept.  Answers that still do not fit lose their end, or the end of their trace.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxpref.data.records import Example, Message, text_of
from jaxpref.data.records.dialogues import ASSISTANT_TURN, HUMAN_TURN
from jaxpref.data.render import Texts

SYSTEM = ("system", "developer")
"""Roles whose turns are always kept."""
NO_ROOM = "the prompt leaves no room for the completion"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Maximum numbers of tokens."""

    whole: int
    """Of a prompt and one answer together."""
    prompt: int | None = None
    """Of a prompt; None for what the answers leave, at least half of `whole`."""

    def room(self, longest_answer: int) -> int:
        """Tokens that a prompt may have."""
        if self.prompt is not None:
            return self.prompt
        return max(self.whole - longest_answer, self.whole // 2)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tokens of an example before it is cut."""

    start: list[int]
    """BOS, or nothing."""
    prompt: list[int]
    completions: list[list[int]]
    texts: Texts
    masks: tuple[list[bool], ...] = ()
    """Which tokens of each completion are trained on; empty if all are."""

    def excess(self, limits: Limits) -> int:
        """Tokens by which the prompt is too long; 0 or less if it fits."""
        longest = max(map(len, self.completions), default=0)
        return len(self.start) + len(self.prompt) - limits.room(longest)


def _has_turns(example: Example) -> bool:
    """Whether the prompt consists of turns, so that whole turns can be left out."""
    prompt = example.prompt
    return not isinstance(prompt, str) or prompt.lstrip().startswith(HUMAN_TURN)


def fitted(
    example: Example,
    parts: Parts | str,
    limits: Limits,
    tokenizer: Any,
    again: Callable[[Example], Parts | str],
) -> tuple[Parts | str, bool, bool]:
    """The example with a prompt that fits, if it consists of turns.

    Returns:
      Its tokens or the reason to drop it, whether turns were dropped, and whether the
      last turn was cut.
    """
    if isinstance(parts, str) or parts.excess(limits) <= 0 or not _has_turns(example):
        return parts, False, False
    fits = lambda x: isinstance(x, str) or x.excess(limits) <= 0
    fewer = list(_with_fewer_turns(example))
    # Rendering takes time in proportion to the turns, and there may be thousands.
    enough = bisect.bisect_left(fewer, True, key=lambda x: fits(again(x)))
    dropped = bool(fewer)
    if fewer:
        example = fewer[min(enough, len(fewer) - 1)]
        parts = again(example)
        if isinstance(parts, str) or fits(parts):
            return parts, dropped, False
    whole, removed = example, 0
    while (excess := parts.excess(limits)) > 0:
        removed += excess
        cut = _with_shorter_turn(whole, removed, tokenizer)
        if cut is None:
            return NO_ROOM, dropped, True
        parts = again(cut)
        if isinstance(parts, str):
            return parts, dropped, True
    return parts, dropped, True


def _with_fewer_turns(example: Example) -> Iterator[Example]:
    """The example without its first turn, then without its first two, and so on."""
    prompt = example.prompt
    if isinstance(prompt, str):
        start = prompt.find("\n\n" + HUMAN_TURN, 1)
        while start > 0:
            yield dataclasses.replace(example, prompt=prompt[start:])
            start = prompt.find("\n\n" + HUMAN_TURN, start + 1)
        return
    kept = _leading_system(prompt)
    for n in range(kept + 1, len(prompt)):
        if prompt[n]["role"] == "user":
            later = [m for m in prompt[kept:n] if m["role"] in SYSTEM]
            turns = (*prompt[:kept], *later, *prompt[n:])
            yield dataclasses.replace(example, prompt=turns)


def _with_shorter_turn(example: Example, excess: int, tokenizer: Any) -> Example | None:
    """The example without the first tokens of its last turn; None if too few.

    Args:
      example: its earlier turns are left out already.
      excess: how many tokens to leave out, at least.
      tokenizer: counts them.
    """
    prompt = example.prompt
    if isinstance(prompt, str):
        lead = prompt[: len(prompt) - len(prompt.lstrip())] + HUMAN_TURN
        asked, answer, rest = prompt[len(lead) :].partition(ASSISTANT_TURN)
        shorter = _without_starts([asked], excess, tokenizer)
        changed: Any = shorter and f"{lead} {shorter[0]}{answer}{rest}"
    else:
        roles = [message["role"] for message in prompt]
        if "user" not in roles:
            return None
        asked = len(roles) - 1 - roles[::-1].index("user")
        # The question and the results of tools: what is long loses its beginning.
        given = [n for n in range(asked, len(prompt)) if roles[n] in ("user", "tool")]
        texts = _without_starts([text_of(prompt[n]) for n in given], excess, tokenizer)
        changed = None
        if texts is not None:
            shorter = {n: {"content": x} for n, x in zip(given, texts, strict=True)}
            changed = tuple(m | shorter.get(n, {}) for n, m in enumerate(prompt))
    return None if changed is None else dataclasses.replace(example, prompt=changed)


def _without_starts(
    texts: Sequence[str], tokens: int, tokenizer: Any
) -> list[str] | None:
    """The texts without `tokens` of their first tokens; None if too little is left.

    The longest lose the most, so that those that are cut become equally long.
    """
    encoded = [
        tokenizer(x, add_special_tokens=False, verbose=False)["input_ids"]
        for x in texts
    ]
    kept = lambda most: sum(min(len(ids), most) for ids in encoded)
    longest = max(map(len, encoded))
    size = bisect.bisect_right(range(longest + 1), kept(longest) - tokens, key=kept) - 1
    if size < 1:
        return None
    cut = [_end(x, ids, size, tokenizer) for x, ids in zip(texts, encoded)]
    return cut if any(cut) else None


def _end(text: str, ids: Sequence[int], size: int, tokenizer: Any) -> str:
    """The last tokens of a text, at most `size`."""
    if len(ids) <= size:
        return text
    # A character may consist of several tokens.
    kept = tokenizer.decode(ids[len(ids) - size :], skip_special_tokens=False)
    return kept.lstrip("\ufffd").lstrip()


def _leading_system(prompt: Sequence[Message]) -> int:
    """The number of system messages before the first turn."""
    roles = [message["role"] not in SYSTEM for message in prompt]
    return roles.index(True) if True in roles else len(roles)
