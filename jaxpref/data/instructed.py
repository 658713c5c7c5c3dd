"""Pairs of prompts: the one whose instructions an answer follows is preferred.

For an answer y to a prompt x, two prompts x_w and x_l add instructions that can be
checked in the text.  Either y follows all of x_w but not all of x_l, or it follows some
of x_w and none of x_l.  A reward model then learns

    P(x_w > x_l | y) = sigmoid(r(x_w, y) - r(x_l, y)),

the response-conditioned Bradley-Terry model (Cai et al. 2025, arXiv:2502.00814, with
instructions on length), and DPO the same with its implicit rewards.  Sun et al. 2025,
"Multi-Level Aware Preference Learning" (MAPL), arXiv:2505.12845: pairs within a sample.
The instructions and their wording are our own.
"""

import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data.answer_text import THINK, has_thought
from jaxpref.data.bad_rows import read_rows
from jaxpref.data.record_options import RecordOptions
from jaxpref.data.records import Example, Message, parse, text_of
from jaxpref.data.sources import Source
from jaxpref.errors import InputError
from jaxpref.runtime.processes import log

SHORTEST = 4
"""Letters of the shortest word that an instruction names."""
PUNCTUATION = string.punctuation + "“”„‘’«»…–—¿¡،؟؛"
"""What may stand at the ends of a word."""
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff]"
)
"""A letter of a script without spaces between words: Thai, Lao, Tibetan, Burmese,
Khmer, kana, or Chinese characters."""
COMMA = re.compile("[,，、،]")
QUESTION = re.compile(r"""[?？؟]["'”’»」』)*_]*\s*\Z""")
"""A question mark at the end, possibly within quotation marks."""
BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
SIDES = ("chosen", "rejected")


class Answer(NamedTuple):
    """What instructions are made from."""

    text: str
    others: str
    """Other texts of the same pair, whose words the answer might have used."""


Instruction = Callable[[Answer, np.random.Generator, bool], str | None]
"""`instruction(answer, rng, followed)`: one that the answer follows, or does not; None
if there is none of this kind."""


def all_instructed_records(
    source: Source, options: RecordOptions, *, count: int, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """The records of all pairs of a source; see `instructed_records`.

    Args:
      source: pairs, from `open_records`.
      options: which fields are ignored, and whether malformed rows are skipped.
      count: instructions in a prompt.
      seed: of the choice of instructions, which depends on the place of the pair, too.

    Returns:
      The records, and how many pairs were dropped because they cannot be used.

    Raises:
      InputError: if a pair is malformed and not to be skipped.
    """

    def read(record: Any, place: str) -> Example | str:
        found = parse(
            record, place, sides=2, drop_empty=True, ignore_fields=options.ignore_fields
        )
        if isinstance(found, Example):
            _check(found, place)
        return found

    found, dropped, without_text = [], 0, 0
    for number, (_, example) in enumerate(read_rows(source, read, options.on_bad_row)):
        if isinstance(example, Example):
            rng = np.random.default_rng([seed, number])
            found += instructed_records(example, count=count, rng=rng)
            without_text += sum(not text.strip() for text in example.texts)
        else:
            dropped += 1
    if without_text:
        log(f"{without_text:,} answers without text, such as tool calls, are dropped")
    return found, dropped


def instructed_records(
    example: Example, *, count: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """A record for each answer of a pair, with the same answer on both sides.

    An answer without text, which only calls tools, gives no record.

    Args:
      example: a pair of texts or of messages.
      count: instructions in a prompt; fewer if fewer kinds can be made.
      rng: chooses the instructions.
    """
    prompt = example.prompt
    asked = prompt if isinstance(prompt, str) else text_of(prompt[_last_user(prompt)])
    for side, text in enumerate(example.texts):
        if not text.strip():
            continue
        answer = Answer(text, f"{asked}\n{example.texts[1 - side]}")
        better, worse = _two_prompts(answer, count, rng)
        value: Any = example.completions[side]
        value = value if isinstance(value, str) else [value]
        prompts = [_edited(prompt, words) for words in (better, worse)]
        record = {f"{name}_prompt": x for name, x in zip(SIDES, prompts)}
        record |= dict.fromkeys(SIDES, value) | _read_by_template(example)
        if example.ended and not example.ended[side]:
            record["ended"] = False
        yield record


def _check(example: Example, where: str) -> None:
    """Refuses pairs of which no instructions can be made.

    Raises:
      InputError: names the row and the field.
    """
    if example.own_prompts or example.traces:
        raise InputError(
            f"{where}: answers with prompts of their own or with traces have no prompt "
            "to edit; remove the row"
        )
    for side, answer in zip(SIDES, example.completions, strict=True):
        if has_thought(answer, THINK):
            raise InputError(
                f"{where}: the {side} answer contains reasoning, which instructions do "
                "not concern; remove the reasoning, or the row"
            )
    turns = () if isinstance(example.prompt, str) else example.prompt
    if turns and all(turn["role"] != "user" for turn in turns):
        raise InputError(
            f"{where}: the prompt has no message of the user to add instructions to; "
            "remove the row"
        )


def _two_prompts(
    answer: Answer, count: int, rng: np.random.Generator
) -> tuple[str, str]:
    """The instructions of x_w and of x_l, of the same kinds."""
    makers = [INSTRUCTIONS[n] for n in rng.permutation(len(INSTRUCTIONS))]
    makers = [x for x in makers if x(answer, rng, True) and x(answer, rng, False)]
    makers = makers[:count]
    n = len(makers)
    if rng.random() < 0.5:
        better, worse = n, int(rng.integers(0, n))  # all, and not all
    else:
        better, worse = int(rng.integers(1, n + 1)), 0  # some, and none

    def words(followed: int) -> str:
        which = rng.permutation(np.arange(n) < followed)
        pairs = zip(makers, which, strict=True)
        return " ".join(make(answer, rng, bool(yes)) or "" for make, yes in pairs)

    return words(better), words(worse)


def length(answer: Answer, rng: np.random.Generator, followed: bool) -> str | None:
    """A limit of the number of words."""
    if UNSPACED.search(answer.text):
        return None
    count = len(answer.text.split())
    distance = int(rng.integers(1, max(2, count // 2 + 1)))
    at_least = bool(rng.integers(2))
    limit = count - distance if at_least == followed else count + distance
    if limit < 1:  # then the answer follows the other one, or cannot be shorter
        at_least, limit = not at_least, count + distance
    bound = "least" if at_least else "most"
    return f"Use at {bound} {limit} word{'s' * (limit != 1)}."


def paragraphs(answer: Answer, rng: np.random.Generator, followed: bool) -> str | None:
    """A number of paragraphs, between which there are empty lines."""
    count = len([x for x in re.split(r"\n\s*\n", answer.text) if x.strip()])
    if not followed:
        count = int(rng.choice([n for n in range(1, count + 3) if n != count]))
    return f"Write exactly {count} paragraph{'s' * (count != 1)}."


def keyword(answer: Answer, rng: np.random.Generator, followed: bool) -> str | None:
    """A word that must or must not occur."""
    text = answer.text.casefold()
    used, others = _words(answer.text), _words(answer.others)
    # Not even as a part of another word, such as an inflected form.
    unused = {key: word for key, word in others.items() if key not in text}
    required = bool(rng.integers(2))
    words = used if required == followed else unused
    if not used or not unused or UNSPACED.search(answer.text):
        return None
    word = words[rng.choice(sorted(words))]
    return f'{"Use" if required else "Do not use"} the word "{word}".'


def _words(text: str) -> dict[str, str]:
    """Words of letters alone, by their case-folded forms; not parts of contractions."""
    words = (word.strip(PUNCTUATION) for word in text.split())
    long = [x for x in words if len(x) >= SHORTEST and x.isalpha()]
    return {x.casefold(): x for x in reversed(long) if not UNSPACED.search(x)}


def bullets(answer: Answer, rng: np.random.Generator, followed: bool) -> str | None:
    """Whether there is a list with bullets."""
    has_list = BULLET.search(answer.text) is not None
    wanted = "Use" if has_list == followed else "Do not use"
    return f"{wanted} a bulleted list."


def commas(answer: Answer, rng: np.random.Generator, followed: bool) -> str | None:
    """Whether there are commas."""
    has_commas = COMMA.search(answer.text) is not None
    return f"Use {'some' if has_commas == followed else 'no'} commas."


def question(answer: Answer, rng: np.random.Generator, followed: bool) -> str | None:
    """Whether a question is the end."""
    is_question = QUESTION.search(answer.text) is not None
    wanted = "End" if is_question == followed else "Do not end"
    return f"{wanted} with a question mark."


INSTRUCTIONS: tuple[Instruction, ...] = (
    *(length, paragraphs, keyword, bullets, commas, question),
)


def _edited(prompt: Any, words: str) -> Any:
    """The prompt with instructions; in a conversation, in the user's last message."""
    # A text may end with the name of the next speaker, so they go before it.
    if isinstance(prompt, str):
        return f"{words}\n\n{prompt.lstrip()}"
    place = _last_user(prompt)
    user = prompt[place]
    edited = {**user, "content": f"{user['content']}\n\n{words}"}
    return [*prompt[:place], edited, *prompt[place + 1 :]]


def _last_user(turns: Sequence[Message]) -> int:
    """The index of the user's last message; a tool's result may follow it."""
    return max(n for n, turn in enumerate(turns) if turn["role"] == "user")


def _read_by_template(example: Example) -> dict[str, Any]:
    """Fields that the chat template reads."""
    tools = example.variables.get("tools")
    others = {k: v for k, v in example.variables.items() if k != "tools"}
    given = {"tools": tools, "chat_template_kwargs": others}
    return {name: value for name, value in given.items() if value}
