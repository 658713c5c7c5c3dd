"""Pairs from answers with scores, and from the answers of two models."""

import collections
import json

import pytest

from jaxpref import cli
from jaxpref.data import ListSource, open_source
from jaxpref.data.make_pairs import joined_pairs, ranked_pairs, read_answers
from jaxpref.errors import InputError
from tests.data_tokenizers import write_lines

SCORED = {
    "prompt": "q",
    "source": "web",
    "completions": ["b", "d", "a", "c"],
    "scores": [3, 1, 4, 1],
    "ended": [True, True, True, False],
}


def pairs_of(record, **options):
    found = ranked_pairs(read_answers(record, "here"), "here", **options)
    return [(x["chosen"], x["rejected"], x["margin"]) for x in found]


def sampled(prompt, *texts, **more):
    answers = [{"output": text, "ended": True, **more} for text in texts]
    return {"record": {"prompt": prompt}, "answers": answers, "generator": "m"}


def test_rules():
    assert pairs_of(SCORED, rule="best-worst") == [("a", "c", 3)]
    # The two with equal scores make no pair.
    assert pairs_of(SCORED, rule="all") == [
        ("a", "b", 1),
        ("a", "d", 3),
        ("a", "c", 3),
        ("b", "d", 2),
        ("b", "c", 2),
    ]
    assert pairs_of(SCORED, rule="all", min_gap=3) == [("a", "d", 3), ("a", "c", 3)]
    assert pairs_of(SCORED | {"scores": [1, 1, 1, 1]}, rule="all") == []
    nothing = {"prompt": "q", "completions": [], "scores": []}
    assert all(pairs_of(nothing, rule=x) == [] for x in ("all", "best-worst"))


def test_best_against_random_is_uniform_and_depends_on_content_alone():
    records = [SCORED | {"prompt": f"q{n}", "ended": None} for n in range(900)]
    drawn = [pairs_of(record, rule="best-random")[0][1] for record in records]
    counts = collections.Counter(drawn)
    assert set(counts) == {"b", "c", "d"}
    # Standard deviation 14 of 300.
    assert all(abs(count - 300) < 60 for count in counts.values())
    again = [pairs_of(record, rule="best-random")[0][1] for record in records[::-1]]
    assert again[::-1] == drawn


def test_what_else_the_record_has_stays():
    (pair,) = ranked_pairs(read_answers(SCORED, "here"), "here", rule="best-worst")
    assert pair == {
        "prompt": "q",
        "source": "web",
        "chosen": "a",
        "rejected": "c",
        "ended": [True, False],
        "chosen_score": 4.0,
        "rejected_score": 1.0,
        "margin": 3.0,
    }


def test_the_answers_of_two_models():
    turns = [{"role": "user", "content": "r"}]
    better = [sampled("q", "a", "same"), sampled("only here", "a"), sampled(turns, "x")]
    worse = [sampled(turns, "y"), sampled("q ", "b", "same", "c")]
    sources = [ListSource(better, "better"), ListSource(worse, "worse")]
    pairs = list(joined_pairs(*sources, "better", "worse"))
    assert pairs == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "ended": [True, True]},
        {"prompt": turns, "chosen": "x", "rejected": "y", "ended": [True, True]},
    ]
    with pytest.raises(InputError, match="worse row 2: its prompt occurs twice"):
        twice = ListSource([worse[1], worse[1]], "worse")
        list(joined_pairs(sources[0], twice, "better", "worse"))
    with pytest.raises(InputError, match="a and b: no prompt is in both"):
        list(joined_pairs(ListSource(better[1:2]), sources[1], "a", "b"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "has no answers; give 'completions'"),
        ([], "has no answers"),
        ({"answers": ["a"]}, "field 'answers' must hold objects with 'output'"),
        (SCORED | {"scores": [1, 2]}, "'scores' must be a list .* of the 4 answers"),
        (SCORED | {"scores": [1, 2, 3, True]}, "must be a finite number"),
        (SCORED | {"scores": [1, 2, 3, float("nan")]}, "must be a finite number"),
        (sampled("q", "a", "b"), "the answers have no scores; .* pass --against"),
    ],
)
def test_wrong_records(record, message):
    with pytest.raises(InputError, match=f"here: .*{message}|here: {message}"):
        pairs_of(record, rule="all")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = SCORED | {"completions": list("dbac"), "scores": [1, 3, 4, 2]}
    write_lines(tmp_path / "scored.jsonl", [SCORED, whole | {"prompt": "r"}])
    cli.main("data pairs scored.jsonl --rule best-worst --out pairs.jsonl".split())
    printed = capsys.readouterr().out
    assert "1 pairs of 2 records; 1 left out, whose answers were cut off" in printed
    assert [open_source("pairs.jsonl")[0]["prompt"]] == ["r"]
    words = "data pairs scored.jsonl --rule all --keep-unfinished --out pairs.jsonl"
    cli.main(words.split())
    assert len(open_source("pairs.jsonl")) == 5 + 6
    before = json.dumps(open_source("scored.jsonl")[0])
    for line, message in (
        ("--out scored.jsonl", "--out scored.jsonl"),
        ("--out o.jsonl --against scored.jsonl --rule all", "leave out --rule"),
        ("--out o.jsonl --min-gap 9", "no pair is left of 2 records"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["data", "pairs", "scored.jsonl", *line.split()])
        assert message in capsys.readouterr().err
    assert json.dumps(open_source("scored.jsonl")[0]) == before
