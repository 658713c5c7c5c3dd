"""Chain of hindsight: fine-tuning on both answers of a pair, with words that rank them.

Liu et al., "Chain of Hindsight Aligns Language Models with Feedback", 2023,
arXiv:2302.02676.  The loss is on the answers alone, and the second one follows the
first.  A sequence `prompt, A bad answer: y_l, A good answer: y_w` is therefore two
records with one completion each.  Both orders are written, so that the model is also
trained to give a good answer at once, which is how it is sampled.
"""

import functools
from collections.abc import Iterator
from typing import Any

from jaxpref.data.bad_rows import read_rows
from jaxpref.data.record_options import RecordOptions
from jaxpref.data.records import Example, parse
from jaxpref.data.sources import Source
from jaxpref.errors import InputError

WORDS = {"bad": "\n\nA bad answer:", "good": "\n\nA good answer:"}
"""What a text continues with before each answer."""
TURNS = {"bad": "Give a bad answer.", "good": "Give a good answer."}
"""What the user asks for in a conversation."""


def all_hindsight_records(
    source: Source, options: RecordOptions
) -> tuple[list[dict[str, Any]], int]:
    """The records of all pairs of a source; see `hindsight_records`.

    Args:
      source: pairs, from `open_records`.
      options: which fields are ignored, and whether malformed rows are skipped.

    Returns:
      The records, and how many pairs were dropped because they cannot be used.

    Raises:
      InputError: if a pair is malformed and not to be skipped.
    """
    read = functools.partial(
        parse, sides=2, drop_empty=True, ignore_fields=options.ignore_fields
    )
    found, dropped = [], 0
    for place, example in read_rows(source, read, options.on_bad_row):
        if isinstance(example, Example):
            found += hindsight_records(example, place)
        else:
            dropped += 1
    return found, dropped


def hindsight_records(example: Example, where: str) -> Iterator[dict[str, Any]]:
    """The records of a pair for `--loss sft`: four, two of each order.

    Args:
      example: a pair of texts or of messages.
      where: "file row n", for errors.

    Raises:
      InputError: if the answers have different prompts or reasoning traces.
    """
    if example.own_prompts or example.traces:
        raise InputError(
            f"{where}: answers with prompts of their own or with traces make no"
            " sequence; remove the row"
        )
    good, bad = example.completions
    answers = {"good": good, "bad": bad}
    for order in (("bad", "good"), ("good", "bad")):
        prompt: Any = example.prompt
        for kind in order:
            answer: Any = answers[kind]
            if isinstance(prompt, str):
                prompt += WORDS[kind]
                yield {"prompt": prompt, "completion": answer}
                prompt += answer
            else:
                prompt = with_request(list(prompt), TURNS[kind])
                yield {"messages": [*prompt, answer]}
                prompt = [*prompt, answer]


def with_request(turns: list[Any], words: str) -> list[Any]:
    """The turns, the last of which is the user's and asks for an answer."""
    last = turns[-1]
    if last["role"] != "user":
        return [*turns, {"role": "user", "content": words}]
    return [*turns[:-1], last | {"content": f"{last['content']}\n\n{words}"}]
