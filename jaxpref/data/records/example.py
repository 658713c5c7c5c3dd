"""The common form of records of all formats."""

import dataclasses
import hashlib
import json
from typing import Any

Message = dict[str, Any]

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with what some templates write before its content."""

IDENTICAL = "chosen and rejected are identical"
PROMPTS_DIFFER = "chosen and rejected do not share the prompt (--own-prompts allows it)"
TIED = "completions have the same rank"
FEW = "a list has fewer than two completions"
EMPTY = "a completion is empty"
HUMAN_LAST = "a dialogue does not end with the assistant's turn"


@dataclasses.dataclass(frozen=True)
class Example:
    """One record, normalized: a prompt and its completions.

    Prompt and completions are strings, or they form a conversation: the prompt is a
    tuple of messages, and each completion is the assistant message that follows it.
    With reasoning traces, the completions are the answers after the traces.
    """

    prompt: str | tuple[Message, ...]
    """Of all completions, or of the first one if they have their own."""
    completions: tuple[str | Message, ...]
    flip: bool = False
    annotator: str | None = None
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By name, a number of the record, or one of each completion of a list."""
    traces: tuple[tuple[str, ...], ...] = ()
    """The traces of each completion, at least one each; empty without traces."""
    empty: bool = False
    """Whether the prompt ends with an empty trace."""
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template receives besides the messages, such as `tools`."""
    ended: tuple[bool, ...] = ()
    """Whether each completion is complete; empty if all are."""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of the record, by the names that `parse` was asked for."""
    own_prompts: tuple[str | tuple[Message, ...], ...] = ()
    """The prompt of each completion, in the form of `prompt`; empty if all share it."""
    turns: tuple[tuple[Message, ...], ...] = ()
    """The messages between the prompt and each completion, which is the last turn: the
    assistant's earlier turns, which are trained on too, and the others' between them.
    Empty if only the last turns are trained on."""

    @property
    def is_conversation(self) -> bool:
        """Whether it is rendered by the tokenizer's chat template."""
        return isinstance(self.prompt, tuple)

    @property
    def texts(self) -> list[str]:
        """The completions as text: of messages, what they say."""
        return [text_of(x) for x in self.completions]

    @property
    def is_identical(self) -> bool:
        """Whether both sides of the pair are the same, including traces."""
        same = lambda sides: len(sides) == 2 and sides[0] == sides[1]
        parts = (x for x in (self.traces, self.own_prompts, self.turns) if x)
        return same(self.completions) and all(map(same, parts))

    @property
    def characters(self) -> tuple[int, ...]:
        """The characters of each completion, over all turns that are trained on."""
        earlier = self.turns or ((),) * len(self.completions)
        return tuple(
            sum(len(text_of(x)) for x in turns if x["role"] == "assistant") + len(text)
            for turns, text in zip(earlier, self.texts, strict=True)
        )

    @property
    def prompts(self) -> tuple[str | tuple[Message, ...], ...]:
        """All its prompts: one, or one for each completion."""
        return self.own_prompts or (self.prompt,)

    @property
    def asked(self) -> tuple[str | tuple[Message, ...], ...]:
        """The prompts by which it is held out: of a text without one, the text."""
        if self.prompt == "" and len(self.completions) == 1:
            return tuple(self.texts)
        return self.prompts

    def alone(self, side: int) -> "Example":
        """One of its completions, with its prompt."""
        own = slice(side, side + 1)
        return dataclasses.replace(
            self,
            prompt=self.own_prompts[side] if self.own_prompts else self.prompt,
            completions=self.completions[own],
            traces=self.traces[own],
            ended=() if all(self.ended[own]) else (False,),
            own_prompts=(),
            turns=self.turns[own] if any(self.turns[own]) else (),
        )

    def num_characters(self) -> int:
        """The number of characters of all texts."""
        turns = (
            turn
            for prompt in self.prompts
            for turn in ((prompt,) if isinstance(prompt, str) else map(text_of, prompt))
        )
        later = (text_of(turn) for turns in self.turns for turn in turns)
        traces = (trace for side in self.traces for trace in side)
        return sum(map(len, (*turns, *later, *self.texts, *traces)))

    def content_id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the content.

        It covers prompt, completions, annotator, traces, and what the chat template is
        given.  It does not depend on whether the run adds an empty trace.
        """
        content = [self.prompt, self.completions, self.annotator]
        parts = (self.traces, self.variables, self.ended, self.own_prompts, self.turns)
        for more in parts:
            content += [more] if more else []
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_of(message: str | Message) -> str:
    """The text of a message; empty if it only calls tools."""
    return message if isinstance(message, str) else message.get("content") or ""


def prompt_key(prompt: str | tuple[Message, ...]) -> str:
    """A key that ignores leading and trailing whitespace of the prompt."""
    if isinstance(prompt, str):
        return prompt.strip()
    bare = [message | {"content": text_of(message).strip()} for message in prompt]
    return json.dumps(bare, sort_keys=True)


def expand(example: Example) -> list[Example]:
    """One example per k, with the k-th trace of each side; shorter lists repeat.

    An example without traces is returned as it is.
    """
    if not example.traces:
        return [example]
    return [
        dataclasses.replace(
            example, traces=tuple((side[k % len(side)],) for side in example.traces)
        )
        for k in range(max(map(len, example.traces)))
    ]
