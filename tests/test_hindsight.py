"""Chain of hindsight: records of both answers, each after what ranks it."""

import json

import pytest

from jaxpref.cli.data import command
from jaxpref.data import examples_of
from jaxpref.errors import InputError
from tests.answers import write_records

ASKED = {"role": "user", "content": "q"}


def written(tmp_path, records, *options):
    out = tmp_path / "out.jsonl"
    file = write_records(tmp_path / "pairs.jsonl", records)
    command(["hindsight", str(file), "--out", str(out), *options])
    return [json.loads(line) for line in out.open()]


def test_a_text_continues_with_each_answer_in_both_orders(tmp_path):
    pair = {"prompt": "q", "chosen": " yes", "rejected": " no"}
    found = written(tmp_path, [pair, pair | {"rejected": " "}])
    assert [(x["prompt"], x["completion"]) for x in found] == [
        ("q\n\nA bad answer:", " no"),
        ("q\n\nA bad answer: no\n\nA good answer:", " yes"),
        ("q\n\nA good answer:", " yes"),
        ("q\n\nA good answer: yes\n\nA bad answer:", " no"),
    ]
    assert len(examples_of(found, sides=1)) == 4


def test_in_a_conversation_the_user_asks_for_each_answer(tmp_path):
    said = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    pair = {"prompt": [ASKED], "chosen": said[:1], "rejected": said[1:]}
    found = written(tmp_path, [pair])
    first = {"role": "user", "content": "q\n\nGive a bad answer."}
    then = {"role": "user", "content": "Give a good answer."}
    assert found[0]["messages"] == [first, said[1]]
    assert found[1]["messages"] == [first, said[1], then, said[0]]
    assert len(examples_of(found, sides=1)) == 4


def test_two_prompts_make_no_sequence(tmp_path):
    pair = {"chosen_prompt": "q", "chosen": "a", "rejected_prompt": "r"}
    with pytest.raises(InputError, match="row 1: answers with prompts of their own"):
        written(tmp_path, [pair | {"rejected": "b"}])
    with pytest.raises(InputError, match="no pair is left of 1 records"):
        bad = [{"prompt": 3, "chosen": "a", "rejected": "b"}]
        written(tmp_path, bad, "--on-bad-row", "skip")
