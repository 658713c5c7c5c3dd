"""What an audit writes for a record whose label it reverses."""

import pytest

from jaxpref.data import ListSource
from jaxpref.data.records import parse
from jaxpref.evaluate.audit_records import cleaned, named_annotators

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        PAIR | {"ended": [True, False]},
        PAIR | {"flip": True},
        {"prompt": "q", "completions": ["a", "b"], "ranking": [1, 2]},
        {"prompt": "q", "completions": ["a", "b"], "ranking": [1, 2], "flip": True},
        {
            "prompt": "q",
            "completions": ["b", "a"],
            "ranking": [2, 1],
            "ended": [False, True],
        },
    ],
)
def test_the_answers_change_places_with_everything_that_is_theirs(record):
    source = named_annotators(ListSource([record]), None)
    judged = [{"row": 1, "action": "relabel", "p_correct": 0.1}]
    (written,) = cleaned(source, judged)
    before, after = (parse(x, "row 1", sides=2) for x in (record, written))
    assert after.completions == before.completions[::-1]
    assert after.ended == before.ended[::-1]
    assert after.flip is False
