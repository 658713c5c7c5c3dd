"""SteerLM: fine-tuning on rated answers, with their ratings in the prompt.

Dong et al., "SteerLM: Attribute Conditioned SFT as an (User-Steerable) Alternative to
RLHF", 2023, arXiv:2310.05344.  The model learns p(y | x, ratings), so that
the ratings in the prompt steer it when it is sampled.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.bad_rows import read_rows
from jaxpref.data.columns import RATING, fields_to_read
from jaxpref.data.record_options import RecordOptions
from jaxpref.data.records import Example, parse
from jaxpref.data.sources import Source


def all_steered_records(
    source: Source, options: RecordOptions, *, attributes: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """The records of all rated answers of a source; see `steered_record`.

    Args:
      source: single answers, from `open_records`.
      options: which fields are ignored, and whether malformed rows are skipped.
      attributes: the fields with ratings, in the order in which they are written.

    Returns:
      The records, and how many answers were dropped because they have no rating or
      cannot be used.

    Raises:
      InputError: if a record is malformed and not to be skipped.
    """
    columns = fields_to_read({}, [RATING + name for name in attributes])
    read = functools.partial(
        parse,
        sides=1,
        drop_empty=True,
        columns=columns,
        ignore_fields=options.ignore_fields,
    )
    found, dropped = [], 0
    for _, example in read_rows(source, read, options.on_bad_row):
        if isinstance(example, Example):
            ratings = {name: example.numbers[RATING + name] for name in attributes}
            ratings = {k: x for k, x in ratings.items() if not math.isnan(x)}
            if ratings:
                found.append(steered_record(example, ratings))
                continue
        dropped += 1
    return found, dropped


def steered_record(example: Example, ratings: Mapping[str, float]) -> dict[str, Any]:
    """A rated answer as a record for `--loss sft`: `helpfulness:4,verbosity:2`.

    The ratings follow a text after an empty line; in a conversation, they end the last
    turn before the answer.
    """
    words = ",".join(f"{name}:{value:g}" for name, value in ratings.items())
    (answer,) = example.completions
    if isinstance(example.prompt, str):
        return {"prompt": f"{example.prompt}\n\n{words}\n\n", "completion": answer}
    *before, last = example.prompt
    turn = {**last, "content": f"{last['content']}\n\n{words}"}
    return {"messages": [*before, turn, answer]}
