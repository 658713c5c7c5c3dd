"""Rewards of rules and functions, their combination, and `jaxpref score`."""

import json
import math
import re

import numpy as np
import pytest
from scipy.special import expit

from jaxpref import rewards
from jaxpref.cli.main import main
from jaxpref.data import ListSource, RecordOptions
from jaxpref.data.make_pairs import ranked_pairs, read_answers
from jaxpref.errors import InputError
from jaxpref.rewards import rules


def answered(*records, **options):
    return rewards.read_answered(ListSource(records), RecordOptions(**options))


def score(tmp_path, records, *words):
    """The records that `jaxpref score` writes."""
    path, out = tmp_path / "answers.jsonl", tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    main(["score", "--data", str(path), "--out", str(out), *words])
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("So it is 1,000.50 dollars", "1000.5", 1),
        ("#### 42", "6 * 7 = 42", 1),
        ("first 42, then 43", "42", 0),
        ("-3", "3", 0),
        ("no number", "3", 0),
        ("3", "no number", 0),
    ],
)
def test_the_last_number_is_compared(text, reference, right):
    assert rules.number(text, reference) == right


def test_rules_of_texts():
    assert rules.words(" two\nwords ") == 2 and rules.characters("äb") == 2
    assert rules.distinct("a b a b a", size=2) == 0.5  # ab, ba of 4
    assert rules.distinct("a", size=2) == 1
    assert rules.exact(" The  End ", "the end") == 1
    assert rules.matches("a\nb", pattern=re.compile("a.b", re.DOTALL)) == 1


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("rule:word", "no such rule"),
        ("rule:distinct", "rule:distinct:3"),
        ("rule:distinct:0", "rule:distinct:3"),
        ("rule:regex:(", "not a regular expression"),
        ("rule:regex", "give a pattern"),
        ("rule:words:3", "takes no argument"),
        ("log-ratio:a", "log-ratio:STRONG:WEAK"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("math:no_such", "has no function no_such"),
    ],
)
def test_rewards_that_are_none(word, fragment):
    with pytest.raises(InputError, match=re.escape(fragment)):
        rewards.reward_of(word, rewards.ModelOptions())


def test_log_sigmoid_is_the_log_probability_to_beat_the_reference():
    r = np.array([-60.0, -1.0, 0.5, 80.0])
    found = rewards.log_sigmoid_centered(r, 0.5)
    np.testing.assert_allclose(found[1:], np.log(expit(r[1:] - 0.5)), atol=1e-15)
    assert math.isclose(found[0], -60.5)  # no underflow


def test_lists_pairs_and_single_answers(tmp_path):
    records = [
        {"prompt": "p", "completions": ["a b", "a"], "topic": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "a b c"},
        {"prompt": "p", "completion": "a b c d"},
        {
            "record": {"prompt": "p"},
            "answers": [{"output": "a", "logp": -1.0, "ended": True}],
            "generator": "m",
        },
    ]
    found = score(tmp_path, records, "--reward", "rule:words")
    assert found[0] == records[0] | {"scores": [2, 1]}
    assert found[1] == records[1] | {"chosen_score": 1, "rejected_score": 3}
    assert found[2] == records[2] | {"score": 4}
    assert found[3]["answers"] == [{**records[3]["answers"][0], "score": 1}]


def test_scored_samples_become_pairs(tmp_path):
    records = [{"prompt": "p", "completions": ["a", "a b", "a b c"]}]
    score(tmp_path, records, "--reward", "rule:words")
    pairs = tmp_path / "pairs.jsonl"
    words = ["--data", str(tmp_path / "scored.jsonl"), "--out", str(pairs)]
    main(["data", "pairs", *words, "--rule", "best-worst"])
    pair = json.loads(pairs.read_text())
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("a b c", "a", 2)


def test_answers_without_a_score_make_no_pair(tmp_path):
    texts = {"a": 1, "b": None, "c": 2}
    answers = [{"output": text, "score": score} for text, score in texts.items()]
    records = [
        {"record": {"prompt": "p"}, "answers": answers},
        {"prompt": "p", "completions": [*texts], "scores": [*texts.values()]},
    ]
    for record in records:
        read = read_answers(record, "row 1")
        (pair,) = ranked_pairs(read, "row 1", rule="all")
        assert (pair["chosen"], pair["rejected"]) == ("c", "a")


def test_rewards_are_combined(tmp_path):
    records = [
        {"prompt": "p", "answer": "2", "completions": ["a 1", "b b 2", "c 2", "2"]}
    ]
    words = ["--reward", "rule:words", "--reward", "rule:number"]
    (found,) = score(tmp_path, records, *words, "--weights", "1", "10")
    parts = {"rule:words": [2, 3, 2, 1], "rule:number": [0, 1, 1, 1]}
    assert found["rewards"] == parts and found["scores"] == [2, 13, 12, 11]
    (found,) = score(tmp_path, records, *words, "--combine", "log_sigmoid")
    expected = sum(
        np.log(expit(np.array(x) - np.quantile(x, 0.85))) for x in parts.values()
    )
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-12)


def test_a_function_of_the_users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_reward_functions.py").write_text(
        "def shorter(prompt, answer, record):\n"
        "    return record['scale'] * (len(prompt) - len(answer))\n"
        "def broken(prompt, answer, record):\n"
        "    return None if answer == 'a' else 1 / 0\n"
    )
    records = [{"prompt": "abc", "completions": ["a", "ab"], "scale": 2}]
    (found,) = score(tmp_path, records, "--reward", "my_reward_functions:shorter")
    assert found["scores"] == [4, 2]
    broken = rewards.reward_of("my_reward_functions:broken", rewards.ModelOptions())
    with pytest.raises(InputError, match="row 1: .*must return a number.* None"):
        broken(answered(records[0]))
    with pytest.raises(InputError, match="raised ZeroDivisionError"):
        broken(answered({"prompt": "p", "completion": "b"}))


def test_the_right_answer_must_be_there(tmp_path):
    options = rewards.RewardOptions(answer_field="target")
    rule = rewards.reward_of("rule:number", rewards.ModelOptions(), options)
    with pytest.raises(InputError, match="'target' must hold the right answer"):
        rule(answered({"prompt": "p", "completion": "2"}))
    sampled = {
        "record": {"prompt": "p", "target": 2},
        "answers": [{"output": "it is 2.0"}],
    }
    assert rule(answered(sampled))[0].tolist() == [1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--answer-field", "target"),
        ("--reference-quantile", "0.5"),
        ("--principle", "be brief"),
        ("--follow-up-model", "m"),
    ],
)
def test_an_option_that_no_reward_reads_is_refused(option, value, capsys):
    words = "--data d --out o.jsonl --reward rule:words".split()
    with pytest.raises(SystemExit):
        main(["score", *words, option, value])
    assert option in capsys.readouterr().err
