"""Interpretable features of an answer's text: length, lists, hedging, and so on.

Each is a number that a person can check by reading.  Counts of structure enter as
log(1 + count).  Words of a kind enter as their number per 100 words, where the answer
counts as 20 words longer than it is, so that one word does not dominate a short one.
The word lists are English; in other languages, only length and structure count.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

PADDING = 20
"""Words added to the length of an answer before a share of words is taken."""


class _Structure(NamedTuple):
    """A pattern to count."""

    meaning: str
    pattern: re.Pattern
    needs: str
    """Texts without any of these characters do not match."""


def _structure(meaning: str, pattern: str, needs: str) -> _Structure:
    return _Structure(meaning, re.compile(pattern, re.MULTILINE), needs)


_STRUCTURE: Mapping[str, _Structure] = {
    "paragraphs": _structure("paragraphs", r"\n\s*\n", "\n"),
    "bullets": _structure("bulleted list items", r"^[ \t]*[-*•][ \t]+\S", "-*•"),
    "numbered": _structure("numbered list items", r"^[ \t]*\d{1,2}[.)][ \t]", ".)"),
    "headings": _structure("Markdown headings", r"^#{1,6} +\S", "#"),
    "bold": _structure("bold passages", r"\*\*[^*\n]+\*\*|__[^_\n]+__", "*_"),
    "code": _structure("code blocks and inline code", r"```|`[^`\n]+`", "`"),
    "tables": _structure("rows of Markdown tables", r"^[ \t]*\|.+\|[ \t]*$", "|"),
    "citations": _structure(
        "links and citations",
        r"https?://|www\.|\[\d+\]|\([A-Z][a-z]+(?: et al\.)?,? \d{4}\)",
        "/[(.",
    ),
    "numbers": _structure("numbers", r"\d+(?:[.,]\d+)*", "0123456789"),
    "formulas": _structure("formulas", r"\$[^$\n]+\$|\\\(|\\\[|\S *= *\S", "$\\="),
    "questions": _structure("question marks", r"\?", "?"),
    "exclamations": _structure("exclamation marks", "!", "!"),
    "quotes": _structure("quotations", r"[\"“][^\"”\n]+[\"”]", '"“'),
    "parentheses": _structure("parentheses", r"\([^)\n]+\)", "("),
}


class _Kind(NamedTuple):
    """Words of a kind."""

    meaning: str
    words: str
    """Single words, separated by spaces."""
    phrases: tuple[str, ...] = ()


_KINDS: Mapping[str, _Kind] = {
    "hedging": _Kind(
        "hedging (may, perhaps, I think)",
        "may might maybe perhaps possibly probably likely seems seem appears could "
        "generally usually somewhat often",
        ("i think", "i believe", "i guess", "not sure", "it depends"),
    ),
    "certainty": _Kind(
        "certainty (always, clearly, must)",
        "always never clearly certainly definitely obviously must undoubtedly "
        "absolutely surely",
        ("of course", "in fact"),
    ),
    "refusal": _Kind(
        "refusal (I can't, I won't)",
        "",
        (
            *("i can't", "i cannot", "i can not", "i won't", "i will not"),
            *("i'm not able to", "i am not able to", "i am unable to", "as an ai"),
            *("i'm unable to", "not comfortable", "not appropriate", "i must decline"),
        ),
    ),
    "apology": _Kind("apologies", "sorry apologies apologize apologise regret"),
    "warning": _Kind(
        "warnings and advice to see an expert",
        "warning caution careful dangerous illegal risk risks unsafe harmful consult "
        "professional doctor lawyer",
        ("important to",),
    ),
    "positive": _Kind(
        "positive words",
        "good great best better love nice happy excellent wonderful fun enjoy "
        "beautiful perfect easy helpful glad fantastic amazing delicious interesting",
    ),
    "negative": _Kind(
        "negative words",
        "bad worst worse hate terrible awful wrong sad stupid difficult hard problem "
        "unfortunately poor boring horrible kill hurt angry fail failed fails",
    ),
    "first_person": _Kind("first person (I, me, my)", "i i'm i've i'd i'll me my mine"),
    "second_person": _Kind("second person (you, your)", "you you're your yours"),
    "examples": _Kind(
        "examples", "", ("for example", "e.g", "for instance", "such as", "like this")
    ),
    "reasons": _Kind(
        "reasons (because, so, therefore)",
        "because since therefore thus so hence",
        ("due to",),
    ),
    "contrast": _Kind(
        "contrast (but, however)",
        "but however although though while yet instead",
    ),
    "courtesy": _Kind(
        "courtesy (please, thanks, happy to help)",
        "please thanks welcome",
        ("thank you", "happy to", "let me know"),
    ),
    "steps": _Kind(
        "order of steps (first, then)", "first second then next finally after step"
    ),
}
_SHAPE: Mapping[str, str] = {
    "length": "words (log)",
    "sentence_length": "words per sentence (log)",
    "reading_level": "reading level (Flesch-Kincaid grade)",
    "long_words": "words of seven or more letters (share)",
    "variety": "different words (Guiraud's index)",
    "capitals": "words in capitals (share)",
    "copying": "words that occur in the prompt (share)",
    "cut_off": "ends without punctuation",
}
NAMES: tuple[str, ...] = (*_SHAPE, *_STRUCTURE, *_KINDS)
"""The names of the features, in the order of the columns of `describe_answers`."""
MEANINGS: Mapping[str, str] = {
    **_SHAPE,
    **{name: one.meaning for name, one in _STRUCTURE.items()},
    **{name: kind.meaning for name, kind in _KINDS.items()},
}
"""What each feature measures, for tables."""

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
"""A word, with its apostrophes."""
_SENTENCE = re.compile(r"[.!?]+(?=\s|$)|\n+")
_VOWELS = re.compile("[aeiouy]+")
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")
_PLACE = {
    word: place
    for place, kind in enumerate(_KINDS.values())
    for word in kind.words.split()
}
_PHRASES = [
    (place, phrase, re.compile(rf"\b{re.escape(phrase)}\b"))
    for place, kind in enumerate(_KINDS.values())
    for phrase in kind.phrases
]


def describe_answers(
    answers: Sequence[tuple[str, str]],
) -> Float[np.ndarray, "answers features"]:
    """The features of answers, in the order of `NAMES`.

    Args:
      answers: pairs of a prompt and an answer.

    Returns:
      float64 [answers, features].
    """
    return np.array([_describe(*answer) for answer in answers]).reshape(-1, len(NAMES))


def _describe(prompt: str, answer: str) -> list[float]:
    lower = answer.lower().replace("’", "'")
    words = WORD.findall(lower)
    per_word = 100.0 / (len(words) + PADDING)
    return [
        *_shape(prompt, answer, lower, words),
        *(_count(one, answer) for one in _STRUCTURE.values()),
        *(per_word * count for count in _of_kinds(lower, words)),
    ]


def _count(one: _Structure, answer: str) -> float:
    """log(1 + count) of a pattern."""
    if not any(character in answer for character in one.needs):
        return 0.0
    return math.log1p(len(one.pattern.findall(answer)))


def _of_kinds(lower: str, words: list[str]) -> list[int]:
    """The number of words and phrases of each of `_KINDS`."""
    counts = [0] * len(_KINDS)
    for word in words:
        if (place := _PLACE.get(word)) is not None:
            counts[place] += 1
    for place, phrase, pattern in _PHRASES:
        if phrase in lower:
            counts[place] += len(pattern.findall(lower))
    return counts


def _shape(prompt: str, answer: str, lower: str, words: list[str]) -> list[float]:
    """The features of `_SHAPE`."""
    count, padded = len(words), len(words) + PADDING
    sentences = max(1, len(_SENTENCE.findall(answer.strip())))
    syllables = len(_VOWELS.findall(lower))
    level = 0.39 * count / sentences + 11.8 * syllables / max(1, count) - 15.59
    asked = set(WORD.findall(prompt.lower().replace("’", "'")))
    end = answer.rstrip()[-1:]
    return [
        math.log1p(count),
        math.log1p(count / sentences),
        min(level, 30.0) if count else 0.0,
        sum(len(word) >= 7 for word in words) / padded,
        len(set(words)) / math.sqrt(max(1, count)),
        len(_CAPITALS.findall(answer)) / padded,
        sum(word in asked for word in words) / padded,
        float(end.isalnum() or end in tuple(",;:-")),
    ]
