"""How rows become tokens: options, kind of record, and the functions they decide."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxpref.data.documents import with_documents
from jaxpref.data.inject import fields_read
from jaxpref.data.kinds import ANSWERS, Kind
from jaxpref.data.options import DataOptions
from jaxpref.data.rationales import with_rationales
from jaxpref.data.records import Example
from jaxpref.data.to_pairs import ToPairs
from jaxpref.data.tokenize import tokenize

_IRRELEVANT = ("heldout_fraction", "allow_shared_prompts", "inject", "max_pairs")


@dataclasses.dataclass(frozen=True)
class Rules:
    """How rows become tokens."""

    to_pairs: ToPairs
    """A function of a module, since other processes import it."""
    options: DataOptions
    kind: Kind
    whole_turns: bool = False

    def describe(self) -> dict[str, Any]:
        """All that decides the content of a chunk besides rows, tokenizer, and code."""
        options = dataclasses.asdict(self.options)
        return {
            "options": {k: v for k, v in options.items() if k not in _IRRELEVANT},
            "values": sorted(fields_read(self.options.inject)),
            "topic": self.options.inject.topic,
            "inject": self.options.inject.active,
            "sides": self.kind.sides,
            "numbers": sorted(self.kind.numbers),
            "rationale": self.kind.rationale,
            "pairs": self.to_pairs.__name__,
            "whole_turns": self.whole_turns,
        }

    def tokenizing(
        self, tokenizer: Any
    ) -> Callable[[Sequence[Example], Sequence[str]], list[Any]]:
        """`(examples, places) -> tokens` of each, or of its pieces, or a reason."""
        make = functools.partial(
            tokenize,
            tokenizer=tokenizer,
            max_length=self.options.longest,
            max_prompt_length=self.options.max_prompt_length,
            markers=self.options.markers,
            whole_turns=self.whole_turns,
        )
        if self.kind.rationale:
            return functools.partial(with_rationales, tokenize=make)
        if self.kind == ANSWERS:
            return functools.partial(
                with_documents,
                tokenize=make,
                tokenizer=tokenizer,
                max_length=self.options.longest,
            )
        return make
