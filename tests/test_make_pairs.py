"""Pairs from answers with scores, and from the answers of two models."""

import collections
import json

import pytest

from jaxpref import cli
from jaxpref.data import ListSource, examples_of, open_source
from jaxpref.data.answers import read_answers
from jaxpref.data.make_pairs import (
    Usable,
    best_against_worst,
    joined_pairs,
    ranked_pairs,
)
from jaxpref.errors import InputError
from tests.data_tokenizers import write_lines

SCORED = {
    "prompt": "q",
    "source": "web",
    "completions": ["b", "d", "a", "c"],
    "scores": [3, 1, 4, 1],
    "ended": [True, True, True, False],
}


def pairs_of(record, complete=False, **options):
    usable = Usable(complete=complete)
    options["usable"] = usable
    found = ranked_pairs(read_answers(record, "here"), "here", **options)
    return [(x["chosen"], x["rejected"], x["margin"]) for x in found]


def sampled(prompt, *texts, **more):
    answers = [{"text": text, "ended": True, **more} for text in texts]
    return {"prompt": prompt, "completions": answers, "generator": "m"}


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
    worst = pairs_of(SCORED | {"scores": [3, 1, 4, 2]}, rule="best-worst", most=9)
    assert worst == [("a", "d", 3), ("b", "c", 1)]
    empty = {"prompt": "q", "completions": ["a", " ", "b"], "scores": [1, 0, 2]}
    assert pairs_of(empty, rule="best-worst") == [("b", "a", 1)]
    same = {"prompt": "q", "completions": ["a", "a"], "scores": [1, 1.5]}
    assert pairs_of(same, rule="best-worst") == []
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
    answers, every = read_answers(SCORED, "here"), Usable(complete=False)
    (pair,) = ranked_pairs(answers, "here", rule="best-worst", usable=every)
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
    better = [
        sampled("q", "a", "same", "c"),
        sampled("only here", "a"),
        sampled(turns, "x"),
    ]
    worse = [sampled(turns, "y"), sampled("q ", "b", "same", "")]
    sources = [ListSource(better, "better"), ListSource(worse, "worse")]
    pairs = list(joined_pairs(*sources, "better and worse"))
    assert pairs == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "ended": [True, True]},
        {"prompt": turns, "chosen": "x", "rejected": "y", "ended": [True, True]},
    ]
    with pytest.raises(InputError, match="worse row 2: its prompt occurs twice"):
        twice = ListSource([worse[1], worse[1]], "worse")
        list(joined_pairs(sources[0], twice, "both"))
    with pytest.raises(InputError, match="a and b: no prompt is in both"):
        list(joined_pairs(ListSource(better[1:2]), sources[1], "a and b"))


def scored(prompt, **scores):
    return sampled(prompt, *scores) | {"scores": [*scores.values()]}


def test_the_best_answer_against_the_worst_of_another_model():
    later = [scored("q", a=3, b=5), scored("r", c=1), scored("s", d=2)]
    first = [scored("s", e=2, f=3), scored("q", g=4, h=7, i=0), scored("r", j=0.5)]
    sources = [ListSource(later, "later"), ListSource(first, "first")]

    def found(rule="best-worst", **options):
        pairs = best_against_worst(*sources, "both", rule=rule, **options)
        return [(x["chosen"], x["rejected"], x["margin"]) for x in pairs]

    # Of "s", no answer of the first model is worse.
    assert found() == [("b", "i", 5), ("c", "j", 0.5)]
    assert found(min_gap=1) == [("b", "i", 5)]
    assert found(min_score=1.5) == [("b", "i", 5)]
    assert found(most=2) == [("b", "i", 5), ("c", "j", 0.5)]  # a is worse than g
    drawn = found("best-random")
    assert drawn[0][:2] in (("b", "g"), ("b", "i")) and drawn[1] == ("c", "j", 0.5)
    with pytest.raises(InputError, match="first row 1: the answers have no scores"):
        sources = [sources[0], ListSource([sampled("q", "a")], "first")]
        found()


def test_right_and_wrong_answers():
    right = {"prompt": "q", "completions": list("abcd"), "scores": [1, 0, 1, 0]}
    every = pairs_of(right, rule="all")
    assert {x[:2] for x in every} == {("a", "b"), ("a", "d"), ("c", "b"), ("c", "d")}
    some = pairs_of(right, rule="all", most=2)
    assert len(some) == 2 and set(some) < set(every)
    assert some == pairs_of(right, rule="all", most=2)
    records = [right | {"prompt": f"q{n}"} for n in range(40)]
    drawn = {x for one in records for x in pairs_of(one, rule="all", most=1)}
    assert drawn == set(every)
    assert pairs_of(SCORED, rule="all", min_score=4) == pairs_of(SCORED, rule="all")[:3]


def test_the_reasoning_is_split_from_the_answer(tmp_path, capsys):
    turns = [{"role": "user", "content": "q"}]
    texts = [
        "<think>\n1 + 1\n</think>\n\n2",
        "<think>no end",
        "so</think> 3",
        "</think> ",
    ]
    record = {"prompt": turns, "completions": texts, "scores": [3, 2, 1, 0]}
    write_lines(tmp_path / "scored.jsonl", [record])
    words = f"data pairs {tmp_path}/scored.jsonl --rule all --out {tmp_path}/p.jsonl"
    cli.main([*words.split(), "--trace-close", "</think>"])
    source = open_source(str(tmp_path / "p.jsonl"))
    assert len(source) == 1
    (example,) = examples_of([source[0]])
    assert example.traces == (("1 + 1",), ("so",)) and example.texts == ["2", "3"]
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--trace-close", "</reason>"])
    assert "left out: 4 without </reason>" in capsys.readouterr().err


def test_answers_of_vllm():
    outputs = [
        {"index": 0, "text": " a", "finish_reason": "stop", "cumulative_logprob": -1.0},
        {"index": 1, "text": " b", "finish_reason": "length"},
    ]
    found = read_answers({"prompt": "q", "outputs": outputs}, "here")
    assert found.texts == (" a", " b") and found.ended == (True, False)
    assert found.record == {"prompt": "q"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "has no answers; give 'completions'"),
        ([], "has no answers"),
        ({"answers": ["a"]}, "has no answers; give 'completions'"),
        ({"completions": ["a", {"text": "b"}]}, "field 'completions' must hold texts"),
        ({"completions": [{"output": "a"}]}, "object 1 has no 'text'"),
        (SCORED | {"scores": [1, 2]}, "'scores' must be a list .* of the 4 answers"),
        (SCORED | {"scores": [1, 2, 3, True]}, "must be a finite number"),
        (SCORED | {"scores": [1, 2, 3, float("nan")]}, "must be a finite number"),
        (sampled("q", "a", "b"), "the answers have no scores; .* or pass --against"),
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
    assert "2 pairs of 2 records; left out: 2 that were cut off" in printed
    # The worst of the other answers is taken instead.
    found = open_source("pairs.jsonl")
    assert [found[n]["rejected"] for n in range(2)] == ["d", "d"]
    words = "data pairs scored.jsonl --rule all --keep-unfinished --out pairs.jsonl"
    cli.main(words.split())
    assert len(open_source("pairs.jsonl")) == 5 + 6
    before = json.dumps(open_source("scored.jsonl")[0])
    for line, message in (
        ("--out scored.jsonl", "--out scored.jsonl"),
        ("--out o.jsonl --against scored.jsonl --rule all", "--rule best-worst or"),
        ("--out o.jsonl --against scored.jsonl --min-gap 1", "leave out --min-gap"),
        ("--out o.jsonl --per-prompt 2", "only --rule all and best-worst make"),
        ("--out o.jsonl --min-gap 9", "no pair is left of 2 records"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["data", "pairs", "scored.jsonl", *line.split()])
        assert message in capsys.readouterr().err
    assert json.dumps(open_source("scored.jsonl")[0]) == before
