r"""Which prompts are the same, whatever the form of their records.

A prompt may be a string, a dialogue in the style of HH-RLHF, or messages.  These are
the same prompt:

    "q"    "\n\nHuman: q\n\nAssistant:"    [{"role": "user", "content": "q"}]
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxpref.data.dataset import PROMPTS, PreferenceDataset
from jaxpref.data.records import Message, prompt_key
from jaxpref.errors import InputError

Prompt = str | tuple[Message, ...]

MOST_SHARED = 0.05
"""Maximum share of evaluation pairs whose prompts may be in the training data."""
_TOGETHER = 1 << 14  # prompts hashed at once
_NAMES = {"user": "Human", "assistant": "Assistant"}
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def split_key(prompt: Prompt) -> str:
    r"""The text by whose hash a prompt is held out; the same for all forms of a prompt.

    White space at the ends of a prompt and of its turns is ignored.  A string is its
    own key, and so is a dialogue of several turns `Human: ...\n\nAssistant: ...`.
    Messages have the key of the equivalent string or dialogue.
    """
    turns = _turns(prompt)
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    text = "\n\n".join(f"{_NAMES.get(role, role)}: {said}" for role, said in turns)
    return text if not turns or turns[-1][0] == "assistant" else f"{text}\n\nAssistant:"


def prompt_hash(prompt: Prompt) -> int:
    """A 64-bit hash of the prompt, the same for all its forms and any whitespace."""
    text = unicodedata.normalize("NFC", " ".join(split_key(prompt).split()))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def grouped_keys(prompts: Iterable[Prompt]) -> list[str]:
    """A key per prompt; prompts that differ in form or whitespace only share one.

    It is the `prompt_key` of one of these prompts, whatever their order.
    """
    found = [(prompt_hash(prompt), prompt_key(prompt)) for prompt in prompts]
    least: dict[int, str] = {}
    for number, key in found:
        least[number] = min(key, least.get(number, key))
    return [least[number] for number, _ in found]


@dataclasses.dataclass(frozen=True)
class Shared:
    """How many evaluation pairs have a prompt of the training data."""

    pairs: int
    """Evaluation pairs whose prompt is also a training pair's."""
    of_pairs: int
    """All evaluation pairs."""
    prompts: int
    """Their distinct prompts."""
    of_prompts: int
    """All distinct prompts of the evaluation pairs."""

    @property
    def share(self) -> float:
        """The share of the pairs."""
        return self.pairs / max(self.of_pairs, 1)

    def describe(self) -> str:
        """The counts, as the end of a sentence."""
        return (
            f"{self.pairs:,} of {self.of_pairs:,} pairs ({self.share:.1%}; "
            f"{self.prompts:,} of {self.of_prompts:,} prompts)"
        )


def count_shared(
    train: PreferenceDataset, heldout: PreferenceDataset, *, bos: int | None
) -> Shared:
    """Counts the evaluation pairs whose prompt is also in the training data.

    Prompts are the same if their texts are, in any form, or their tokens: messages and
    the string that a chat template renders from them differ at most in BOS.
    """
    if not len(heldout):  # nor are the training prompts hashed
        return Shared(pairs=0, of_pairs=0, prompts=0, of_prompts=0)
    # Each [N, 2]: of both prompts of a pair, which are the same for most.
    prompts, others = (
        np.stack([x.columns[name] for name in PROMPTS], 1) for x in (heldout, train)
    )
    shared = np.isin(prompts, others)
    shared |= np.isin(_token_hashes(heldout, bos), _token_hashes(train, bos))
    return Shared(
        pairs=int(shared.any(1).sum()),
        of_pairs=len(prompts),
        prompts=len(np.unique(prompts[shared])),
        of_prompts=len(np.unique(prompts)),
    )


def check_shared(shared: Shared, train: str, heldout: str, *, allowed: bool) -> None:
    """Checks the share of evaluation pairs with prompts of the training data.

    Args:
      shared: from `count_shared`.
      train: the training file, for messages.
      heldout: the evaluation file, for messages.
      allowed: whether any share is allowed.

    Raises:
      InputError: if the share is above `MOST_SHARED` and not allowed.
    """
    if shared.share > MOST_SHARED and not allowed:
        raise InputError(
            f"--eval-data {heldout}: {shared.describe()} have a prompt that is also in "
            f"--data {train}. The limit is {MOST_SHARED:.0%}, because shared prompts "
            "do not show what the model does on new ones; remove them from one of the "
            "two, or pass --allow-shared-prompts"
        )


def _token_hashes(dataset: PreferenceDataset, bos: int | None) -> np.ndarray:
    """A hash of each prompt's tokens without BOS, of the first two sides: [N, 2]."""
    starts, sizes = dataset.offsets[:-1], dataset.prompt_lengths.astype(np.int64)
    if bos is not None and len(dataset.tokens):
        begins = (dataset.tokens[starts] == bos) & (sizes > 0)
        starts, sizes = starts + begins, sizes - begins
    hashes = np.empty(len(sizes), np.uint64)
    for first in range(0, len(sizes), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        hashes[part] = _span_hashes(dataset.tokens, starts[part], sizes[part])
    found = np.stack([hashes, hashes], axis=1)
    last = min(dataset.num_completions, 2) - 1
    for n in np.flatnonzero(dataset.side_prompt_lengths.any(axis=1)).tolist():
        for side in (0, last):
            prompt = dataset.context(n, side)
            prompt = prompt[int(prompt[:1].tolist() == [bos]) :]
            whole = np.zeros(1, np.int64), np.array([len(prompt)])
            found[n, side:] = _span_hashes(prompt, *whole)
    return found


def _span_hashes(
    tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """A 64-bit hash of each span of tokens: a sum over mixed tokens and places."""
    ends = np.cumsum(sizes)
    place = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(
        ends - sizes, sizes
    )
    of_tokens = tokens[place + np.repeat(starts, sizes)].astype(np.uint64)
    mixed = _mixed(of_tokens + (place.astype(np.uint64) << np.uint64(32)))
    # Differences of running sums, which wrap around together.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return _mixed(sums[ends] - sums[ends - sizes] + sizes.astype(np.uint64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, a bijection whose bits look random.

    Steele, Lea and Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _turns(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, text) of each turn that is not empty."""
    if not isinstance(prompt, str):
        found = [(_role(message), _said(message)) for message in prompt]
    elif _is_dialogue(text := prompt.strip()):
        _, *parts = _TURN.split(f"\n\n{text}")
        found = [(_ROLES[who], said) for who, said in zip(parts[::2], parts[1::2])]
    else:
        return [("user", text)]
    return [(role, said.strip()) for role, said in found if said.strip()]


def _is_dialogue(text: str) -> bool:
    return text.startswith("Human:") and text.endswith("\n\nAssistant:")


def _role(message: Mapping[str, Any]) -> str:
    role = str(message.get("role"))
    return "system" if role == "developer" else role


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, the texts of its parts, its tool calls."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [x.get("text") if isinstance(x, Mapping) else x for x in content]
        content = "".join(
            x if isinstance(x, str) else json.dumps(part, sort_keys=True)
            for x, part in zip(texts, content)
        )
    calls = message.get("tool_calls")
    called = json.dumps(calls, sort_keys=True) if calls else ""
    return f"{content or ''}{called}"
