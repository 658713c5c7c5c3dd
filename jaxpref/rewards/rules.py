"""Rewards from the text alone: lengths, repetition, and whether an answer is right.

A rule is a function of an answer's text and of the reference answer.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.rewards.answered import Answered

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A number in a text, maybe with commas between its digits."""


def words(text: str) -> float:
    """The number of words, separated by whitespace."""
    return float(len(text.split()))


def characters(text: str) -> float:
    """The number of characters."""
    return float(len(text))


def distinct(text: str, *, size: int) -> float:
    """The share of different n-grams of words among all; 1 if nothing is repeated.

    distinct-n of Li et al. 2016 (arXiv:1510.03055).

    Args:
      text: the answer; one with fewer than `size` words has a share of 1.
      size: n, words of an n-gram, >= 1.
    """
    found = text.split()
    grams = [tuple(found[n : n + size]) for n in range(len(found) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def matches(text: str, *, pattern: re.Pattern[str]) -> float:
    """1 if the pattern occurs in the text, else 0."""
    return float(pattern.search(text) is not None)


def exact(text: str, reference: str) -> float:
    """1 if the text is the reference, else 0; case and whitespace do not count."""
    plain = lambda x: " ".join(x.split()).casefold()
    return float(plain(text) == plain(reference))


def number(text: str, reference: str) -> float:
    """1 if the last number in the text is the last one in the reference, else 0.

    Numbers are compared as decimals: 1,000.50 equals 1000.5.
    """
    right = last_number(reference)
    return float(right is not None and last_number(text) == right)


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None if there is none."""
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


@dataclasses.dataclass(frozen=True)
class TextRule:
    """A reward that depends on the text of the answer alone."""

    of_text: Callable[[str], float]

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`."""
        return [np.array([self.of_text(text) for text in x.texts]) for x in answered]


@dataclasses.dataclass(frozen=True)
class ReferenceRule:
    """A reward that compares the answer with the right one, in a field."""

    compare: Callable[[str, str], float]
    """`compare(text, reference)`."""
    field: str
    """The field of the record with the right answer."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`.

        Raises:
          InputError: if a record lacks the field, or it is not a text or a number.
        """
        return [
            np.array([self.compare(text, right) for text in x.texts])
            for x in answered
            for right in [self._right(x)]
        ]

    def _right(self, answered: Answered) -> str:
        value = answered.field(self.field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(
                f"{answered.place}: field '{self.field}' must hold the right answer, a "
                f"text or a number, but it is {value!r:.50}; name another field with "
                "--answer-field"
            )
        return str(value)


RULES = {
    "words": "rule:words",
    "characters": "rule:characters",
    "distinct": "rule:distinct:3",
    "regex": "rule:regex:PATTERN",
    "exact": "rule:exact",
    "number": "rule:number",
}
"""How each rule is written."""


def rule_of(name: str, argument: str, *, field: str) -> TextRule | ReferenceRule:
    """The rule of a word such as "distinct:3".

    Args:
      name: a key of `RULES`.
      argument: what follows the name, or "".
      field: the field of the record with the right answer.

    Raises:
      InputError: if there is no such rule, or its argument is wrong.
    """
    written = f"--reward rule:{name}" + (f":{argument}" if argument else "")
    if name == "distinct":
        if not (argument.isdecimal() and int(argument) >= 1):
            raise InputError(f"{written}: give the words of an n-gram: {RULES[name]}")
        size = int(argument)
        return TextRule(lambda text: distinct(text, size=size))
    if name == "regex":
        try:
            pattern = re.compile(argument, re.DOTALL)
        except re.error as error:
            raise InputError(f"{written}: not a regular expression: {error}") from None
        if not argument:
            raise InputError(f"{written}: give a pattern: {RULES[name]}")
        return TextRule(lambda text: matches(text, pattern=pattern))
    found: dict[str, TextRule | ReferenceRule] = {
        "words": TextRule(words),
        "characters": TextRule(characters),
        "exact": ReferenceRule(exact, field),
        "number": ReferenceRule(number, field),
    }
    if name not in found:
        raise InputError(f"{written}: no such rule; choose {', '.join(RULES.values())}")
    if argument:
        raise InputError(f"{written}: takes no argument; write {RULES[name]}")
    return found[name]
