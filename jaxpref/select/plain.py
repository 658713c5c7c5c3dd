"""Scores that need no model: a column, and the agreement of annotators."""

import hashlib
import json

import numpy as np
from tqdm import tqdm

from jaxpref.data.records import prompt_key
from jaxpref.errors import InputError, visible
from jaxpref.select.opened import NO_VALUE, Opened
from jaxpref.select.scores import Scores, by_row

ALONE = "fewer than two votes on the pair"
SPLIT = "the votes have no majority"


def by_column(opened: Opened) -> Scores:
    """The number in a field; of a record with several pairs, their mean.

    The field may be one that the format's adapter makes, such as `margin`.

    Raises:
      InputError: if a value is not a number, or no record has one.
    """
    field = str(opened.config.column)
    rows, values, reasons = [], [], {}
    count = len(opened.records)
    for index in tqdm(range(count), desc=visible(field), unit="record", disable=None):
        place = opened.records.location(index)
        found = opened.bad.attempt(
            lambda n=index: (opened.number(n, field, "--column"),), place
        )
        row = opened.records.row(index)
        if found is None or found[0] is None:
            reasons[row] = "malformed" if found is None else NO_VALUE
        else:
            rows.append(row)
            values.append(found[0])
    if not rows:
        raise InputError(
            f"{opened.config.named}: no record has a number in '{field}'; change"
            " --column"
        )
    return by_row(rows, {"score": values}, reasons, len(opened.file))


def by_agreement(opened: Opened) -> Scores:
    """The share of the votes on a pair that agree with the record's label.

        score = votes with the record's label / votes on its two answers

    Votes are the pairs of all records with the same prompt and the same two answers, in
    either order.  The label of a record with several votes is their majority.  Ties do
    not count.

    Raises:
      InputError: if no pair has two votes.
    """
    groups: dict[bytes, int] = {}
    rows, group, sign, reasons = [], [], [], {}
    for row, _, example in opened.examples("votes"):
        if isinstance(example, str):
            reasons[row] = example
            continue
        one, two = (json.dumps(x, sort_keys=True) for x in example.completions)
        text = json.dumps([prompt_key(example.prompt), *sorted((one, two))])
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        rows.append(row)
        group.append(groups.setdefault(key, len(groups)))
        sign.append(1 if one < two else -1)
    count = len(opened.file)
    place, of, signs = (np.array(x, np.int64) for x in (rows, group, sign))
    votes = np.bincount(of, minlength=len(groups))
    balance = np.bincount(of, signs, minlength=len(groups))
    if not len(votes) or votes.max() < 2:
        raise InputError(
            f"{opened.config.named}: no pair has more than one vote, so there is no"
            " agreement; use a file with several votes on a pair, or --by column"
        )
    label = np.sign(np.bincount(place, signs, minlength=count))
    number, score = np.zeros(count, np.int64), np.full(count, np.nan)
    number[place] = votes[of]
    score[place] = (votes[of] + label[place] * balance[of]) / (2 * votes[of])
    said = []
    for n in range(count):
        reason = reasons.get(n, "no pair") if not number[n] else ""
        reason = reason or (ALONE if number[n] < 2 else "" if label[n] else SPLIT)
        said.append(reason)
    return Scores(score, said, {"votes": number.tolist()})
