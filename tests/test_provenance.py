"""What made a checkpoint: equal, or the names of what differs."""

import dataclasses
import json

import pytest

from jaxpref.runtime.provenance import (
    NOTHING,
    Content,
    Provenance,
    changed_options,
    differences,
    flat,
    from_json,
    to_json,
)

MADE = Provenance(
    {"seed": 0, "optimizer.learning_rate": 1e-3, "loss.name": "dpo", "mix": None},
    {"the weights": Content("abc", "/old/model"), "the pairs": Content("1", "a.jsonl")},
)


def with_option(name, value):
    return dataclasses.replace(MADE, options={**MADE.options, name: value})


def with_content(name, digest, path):
    contents = {**MADE.contents, name: Content(digest, path)}
    return dataclasses.replace(MADE, contents=contents)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (MADE, []),
        (with_content("the weights", "abc", "/new/model"), []),  # moved
        (with_option("seed", 1), ["seed (0 -> 1)"]),
        (with_option("mix", False), ["mix (None -> False)"]),
        (
            with_option("optimizer.learning_rate", 2e-3),
            ["optimizer.learning_rate (0.001 -> 0.002)"],
        ),
        (with_option("loss.beta", 0.1), ["loss.beta (None -> 0.1)"]),
        (
            with_content("the weights", "abd", "/old/model"),
            ["the weights (/old/model has changed)"],
        ),
        (
            with_content("the pairs", "2", "b.jsonl"),
            ["the pairs (a.jsonl -> b.jsonl)"],
        ),
        (with_content("the reference", "3", "r"), ["the reference (added)"]),
        (
            dataclasses.replace(MADE, contents={}),
            ["the pairs (removed)", "the weights (removed)"],
        ),
        (
            dataclasses.replace(with_option("seed", 1), contents=MADE.contents),
            ["seed (0 -> 1)"],
        ),
    ],
)
def test_what_differs_is_named(now, expected):
    assert differences(MADE, now) == expected
    # As a checkpoint stores it.
    stored = json.loads(json.dumps(to_json(MADE)))
    assert differences(from_json(stored), now) == expected


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        "",
        {},
        {"options": {}},
        {"options": [1], "contents": {}},
        {"options": {}, "contents": {"the weights": "abc"}},
        {"options": {}, "contents": {"the weights": {"digest": "abc"}}},
        {"options": {}, "contents": {"x": {"digest": "a", "path": "b", "c": 1}}},
    ],
)
def test_something_else_is_no_provenance(stored):
    with pytest.raises(ValueError, match="not the provenance"):
        from_json(stored)


def test_nothing_differs_from_nothing():
    assert differences(NOTHING, NOTHING) == []


def test_names_stand_for_everything_below_them():
    options = {"a": {"b": {"c": 1, "d": 2}, "e": 3}, "f": None, "ab": 4}
    every = {"a.b.c": 1, "a.b.d": 2, "a.e": 3, "f": None, "ab": 4}
    assert flat(options) == every
    assert flat(options, but=("a",)) == {"f": None, "ab": 4}
    assert flat(options, but=("a.b", "f")) == {"a.e": 3, "ab": 4}
    changed = every | {"a.b.c": 9, "ab": 9}
    assert changed_options(every, changed, but=("a.b",)) == ["ab (4 -> 9)"]
