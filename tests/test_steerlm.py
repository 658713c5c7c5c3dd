"""SteerLM: rated answers with their ratings in the prompt."""

import json

import pytest

from jaxpref.cli.data import command
from jaxpref.data import examples_of
from jaxpref.errors import InputError
from tests.answers import write_records


def written(tmp_path, records, *options):
    out = tmp_path / "out.jsonl"
    file = write_records(tmp_path / "answers.jsonl", records)
    command(["steer", str(file), "--out", str(out), *options])
    return [json.loads(line) for line in out.open()]


def test_ratings_follow_the_prompt(tmp_path, capsys):
    text = {"prompt": "q", "completion": "yes", "verbosity": 1.5}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    found = written(
        tmp_path,
        [
            text | {"helpfulness": 4, "other": 1},
            {"messages": turns, "helpfulness": 3, "verbosity": None},
            {"prompt": "q", "completion": "no"},
        ],
    )
    steered = {"role": "user", "content": "q\n\nhelpfulness:3"}
    assert found == [
        {"prompt": "q\n\nhelpfulness:4,verbosity:1.5\n\n", "completion": "yes"},
        {"messages": [steered, turns[1]]},
    ]
    assert "2 records of 3 answers; 1 dropped" in capsys.readouterr().out
    assert len(examples_of(found, sides=1)) == 2
    (only,) = written(tmp_path, [text | {"other": 1}], "--attributes", "other")
    assert only["prompt"] == "q\n\nother:1\n\n"


def test_no_ratings_are_an_error(tmp_path):
    record = {"prompt": "q", "completion": "yes"}
    with pytest.raises(InputError, match="no answer with a rating of x, y is left of"):
        written(tmp_path, [record], "--attributes", "x,y")
    with pytest.raises(InputError, match="row 1: field 'x' must be a number"):
        written(tmp_path, [record | {"x": "good"}], "--attributes", "x")
