"""One record in the form that all formats are read into."""

import dataclasses
import hashlib
import json
from typing import Any

Message = dict[str, Any]

IDENTICAL = "chosen and rejected are identical"
PROMPTS_DIFFER = "chosen and rejected do not share the prompt"
EMPTY = "a completion is empty"
HUMAN_LAST = "a dialogue does not end with the assistant's turn"


@dataclasses.dataclass(frozen=True)
class Example:
    """One record, normalized: a prompt and its completions.

    Either all are strings, or it is a conversation: the prompt is a tuple of messages
    and each completion the assistant message that follows it.  With reasoning traces,
    the completions are the answers after the traces.
    """

    prompt: str | tuple[Message, ...]
    completions: tuple[str | Message, ...]
    flip: bool = False
    annotator: str | None = None
    labels: dict[str, float] = dataclasses.field(default_factory=dict)
    traces: tuple[tuple[str, ...], ...] = ()
    """For each completion its traces, at least one; empty without traces."""
    empty: bool = False
    """The completions are given after an empty trace, which belongs to the prompt."""

    @property
    def is_conversation(self) -> bool:
        """Whether the tokenizer's chat template renders it."""
        return isinstance(self.prompt, tuple)

    @property
    def texts(self) -> list[str]:
        """The completions as text: of messages, what they say."""
        return [x if isinstance(x, str) else x["content"] for x in self.completions]

    @property
    def is_identical(self) -> bool:
        """Whether this pair's two sides are the same, traces included."""
        same = lambda sides: len(sides) == 2 and sides[0] == sides[1]
        return same(self.completions) and (not self.traces or same(self.traces))

    def num_characters(self) -> int:
        """Characters of all texts."""
        prompt = self.prompt
        turns = [prompt] if isinstance(prompt, str) else [x["content"] for x in prompt]
        traces = (trace for side in self.traces for trace in side)
        return sum(map(len, (*turns, *self.texts, *traces)))

    def content_id(self) -> str:
        """16 hexadecimal digits of a SHA-256: prompt, completions, annotator, traces.

        Without traces it is the same whether the run mixes in an empty one or not.
        """
        content = [self.prompt, self.completions, self.annotator]
        content += [self.traces] if self.traces else []
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_key(prompt: str | tuple[Message, ...]) -> str:
    """A string that is equal for prompts that differ only in outer white space."""
    if isinstance(prompt, str):
        return prompt.strip()
    bare = [message | {"content": message["content"].strip()} for message in prompt]
    return json.dumps(bare, sort_keys=True)


def expand(example: Example) -> list[Example]:
    """One example for each k: the k-th traces of all sides; shorter lists repeat.

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
