"""Preference files: the complaint names file, row and field."""

import gzip
import json

import pytest

RECORDS = {
    "not JSON": (b'{"prompt": "a", "chosen', ["not JSON"]),
    "no object": (b'["a", "b"]', ["a list"]),
    "wrong field": (b'{"prompt": "a", "chosn": "b", "rejected": "c"}', ["'chosen'"]),
    "null": (b'{"prompt": "a", "chosen": null, "rejected": "c"}', ["'chosen'", "null"]),
    "wrong type": (b'{"prompt": "a", "chosen": "b", "rejected": 7}', ["'rejected'"]),
    "empty": (b'{"prompt": "a", "chosen": "b", "rejected": " "}', ["'rejected'"]),
    "role": (
        b'{"chosen": [{"role": "bot", "content": "a"}], "rejected": []}',
        ["'chosen'", "message 1", "role"],
    ),
    "flip": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "flip": "yes"}',
        ["'flip'"],
    ),
    "not UTF-8": (b'{"prompt": "caf\xe9", "chosen": "b"}', ["0xe9", "UTF-8"]),
    "10 MB line": (
        b'{"prompt": "%s", "chosen": "b", "rejected": "c"}' % (b"a " * 5_000_000),
        ["'prompt'", "10,000,000 characters"],
    ),
    "endless nesting": (b"[" * 100_000, ["JSON"]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrong_record(inputs, refuse, name):
    record, fragments = RECORDS[name]
    lines = inputs.data.read_bytes().splitlines()
    lines[4] = record
    inputs.data.write_bytes(b"\n".join(lines))
    refuse(inputs.train(), f"{inputs.data} row 5", *fragments)
    assert not (inputs.out / "config.json").exists()


def test_no_file(inputs, refuse):
    refuse(inputs.train(data=inputs.folder / "none.jsonl"), "none.jsonl", "no such")


def test_an_empty_file(inputs, refuse):
    inputs.data.write_bytes(b"")
    refuse(inputs.train(), str(inputs.data), "no records")


def test_a_truncated_gz(inputs, refuse):
    path = inputs.data.with_suffix(".jsonl.gz")
    whole = gzip.compress(inputs.data.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    refuse(inputs.train(data=path), str(path), "ends too early")


def test_chosen_equals_rejected_everywhere(inputs, refuse):
    record = json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
    inputs.data.write_text(f"{record}\n" * 5)
    refuse(inputs.train(), str(inputs.data), "no record is left", "identical 5")


def test_no_pair_to_train_on(inputs, refuse):
    refuse(inputs.train(heldout_fraction=1.0), str(inputs.data), "--heldout-fraction")
