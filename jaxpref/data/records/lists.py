"""Lists of answers: `prompt`, `completions`, and their `scores` or `ranks`.

Larger scores are better; rank 1 is the best.  Answers may tie.  The best answer comes
first in the example, and answers that tie keep their order.  The numbers of a list are

    qualities    the scores; of ranks, the share of the other answers ranked below
    relevances   the same, which must be 0 or more
    ranks        1 to K, for lists without ties
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxpref.data.records.answer_objects import ended_of_answers, texts_of_answers
from jaxpref.data.records.checks import field, kind, read_ended, text_or_messages
from jaxpref.data.records.example import FEW, TIED, Example
from jaxpref.data.records.messages import example_of
from jaxpref.errors import InputError

NUMBERS = ("scores", "ranks", "ranking")
"""Fields with a number for each answer; only one of them may be in a record."""
LARGEST = 3e38
"""The largest allowed score: scores are stored in float32."""


def matches(record: Mapping, sides: int | None) -> bool:
    """Whether the run reads lists; then every record must be one."""
    del record
    return sides is None


def parse(
    record: Mapping, where: str, *, sides: int | None, drop_empty: bool
) -> Example | str:
    """Returns the example with the best answer first; see `Format.parse`."""
    del sides
    given = [name for name in NUMBERS if record.get(name) is not None]
    if len(given) != 1:
        raise InputError(
            f"{where}: a list of answers has 'completions' and either 'scores' (larger "
            "is better) or 'ranks' (1 is the best), but the record has "
            f"{' and '.join(map(repr, given)) or ', '.join(map(str, record))[:200]}"
        )
    (name,) = given
    answers, numbers = field(record, "completions", where), record[name]
    for label, value in (("completions", answers), (name, numbers)):
        if not isinstance(value, list):
            raise InputError(
                f"{where}: field '{label}' must be a list, but it is {kind(value)}"
            )
    if len(answers) != len(numbers):
        raise InputError(
            f"{where}: {len(answers)} 'completions', but {len(numbers)} numbers in"
            f" '{name}'; give one for each"
        )
    qualities = _qualities(numbers, name, where)
    order = sorted(range(len(answers)), key=lambda n: -qualities[n])
    texts = texts_of_answers(answers, f"{where}: field 'completions'")
    named = {f"completions {n + 1}": texts[n] for n in order}
    values = [text_or_messages(named, label, where) for label in named]
    prompt = text_or_messages(record, "prompt", where)
    if len(answers) < 2:
        return FEW
    if len(set(qualities)) < 2:
        return TIED
    example = example_of(prompt, [*named], values, where, drop_empty=drop_empty)
    ended = read_ended(record, where, len(answers)) or ended_of_answers(answers) or ()
    ended = () if all(ended) else ended
    if isinstance(example, str):
        return example
    return dataclasses.replace(
        example,
        numbers={"qualities": tuple(qualities[n] for n in order)},
        ended=tuple(ended[n] for n in order) if ended else (),
    )


def with_numbers(example: Example, read: Collection[str], where: str) -> Example | str:
    """The example of a list with the numbers that are read; see the module's docstring.

    Returns:
      The example, or TIED if ranks are read and answers tie.

    Raises:
      InputError: if relevances are read and a score is negative.
    """
    qualities: Any = example.numbers["qualities"]
    count = len(qualities)
    if "ranks" in read and len(set(qualities)) < count:
        return TIED
    if "relevances" in read and min(qualities) < 0:
        raise InputError(
            f"{where}: field 'scores' has {min(qualities):g}, but relevances must be 0 "
            "or more; add a constant to all scores, or use another loss of lists"
        )
    ranks = tuple(float(n + 1) for n in range(count))
    found = {"qualities": qualities, "relevances": qualities, "ranks": ranks}
    others = {k: x for k, x in example.numbers.items() if k != "qualities"}
    numbers = others | {name: x for name, x in found.items() if name in read}
    return dataclasses.replace(example, numbers=numbers)


def check_other(record: Mapping, where: str, sides: int | None) -> None:
    """Raises InputError if a run that does not read lists gets one with numbers."""
    if sides is not None and is_graded(record):
        what = "pairs" if sides == 2 else "single answers"
        raise InputError(
            f"{where}: a list of answers with numbers, but this command reads "
            f"{what}; train on it with --loss lipo_lambda, plackett_luce or irpo, or "
            "write one record for each pair to compare"
        )


def is_graded(record: Mapping) -> bool:
    """Whether a record is a list of answers with scores or ranks."""
    graded = "completions" in record and ("scores" in record or "ranks" in record)
    return graded and "chosen" not in record


def _qualities(numbers: list, name: str, where: str) -> list[float]:
    """A number for each answer, larger for better ones."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise InputError(
                f"{where}: field '{name}' must hold numbers, but one is {number!r:.50}"
            )
        if not abs(number) <= LARGEST:
            raise InputError(
                f"{where}: field '{name}' must hold finite numbers, but one is"
                f" {number!r:.50}"
            )
    if name == "scores":
        return [float(number) for number in numbers]
    if any(number != math.floor(number) or number < 1 for number in numbers):
        raise InputError(
            f"{where}: field '{name}' must hold whole numbers, where 1 is best"
        )
    others = max(len(numbers) - 1, 1)
    return [sum(other > number for other in numbers) / others for number in numbers]
