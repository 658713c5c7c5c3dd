"""Rewards of rules and functions, their combination, and `jaxpref score`."""

import functools
import json
import math
import re

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax

from jaxpref import rewards
from jaxpref.cli.main import main
from jaxpref.data import ListSource, RecordOptions
from jaxpref.data.answers import read_answers
from jaxpref.data.make_pairs import ranked_pairs
from jaxpref.errors import InputError
from jaxpref.rewards import code, rules


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
            "prompt": "p",
            "completions": [{"text": "a", "logp": -1.0, "ended": True}],
            "generator": "m",
        },
    ]
    found = score(tmp_path, records, "--reward", "rule:words")
    assert found[0] == records[0] | {"scores": [2, 1]}
    assert found[1] == records[1] | {"chosen_score": 1, "rejected_score": 3}
    assert found[2] == records[2] | {"score": 4}
    assert found[3] == records[3] | {"scores": [1]}


def test_only_what_follows_the_reasoning_is_scored(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    answers = [{"text": "<think>a b c</think> d e"}, {"text": "a b c"}]
    record = {"prompt": turns, "completions": answers}
    words = ["--reward", "rule:words", "--answer-after", "</think>"]
    (found,) = score(tmp_path, [record], *words)
    assert found == record | {"scores": [2, 0]}


def test_records_that_cannot_be_read(tmp_path, capsys):
    records = [
        {"prompt": "p", "chosen": "a b", "rejected": ""},
        {"prompt": "p", "chosen": "a b", "rejected": "a"},
    ]
    with pytest.raises(SystemExit):
        score(tmp_path, records, "--reward", "rule:words")
    error = capsys.readouterr().err
    assert "row 1" in error and "empty" in error
    words = ["--reward", "rule:words", "--on-bad-row", "skip"]
    (found,) = score(tmp_path, records, *words)
    assert (found["chosen_score"], found["rejected_score"]) == (2, 1)
    assert "1 malformed rows skipped" in capsys.readouterr().out


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
    scores = [*texts.values()]
    for answers in ([*texts], [{"text": text} for text in texts]):
        record = {"prompt": "p", "completions": answers, "scores": scores}
        (pair,) = ranked_pairs(read_answers(record, "row 1"), "row 1", rule="all")
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


def test_the_lower_bound_of_an_ensemble(tmp_path, capsys):
    """Of words and characters without spaces, by hand."""
    words = ["--reward", "rule:words", "--reward", "rule:characters"]
    words += ["--combine", "lower_bound"]
    records = [{"prompt": "p", "completions": ["a b", "a b cd", "abc"]}]
    parts = np.array([[2.0, 3.0, 1.0], [3.0, 6.0, 3.0]])
    means = parts.sum(1) / 3
    expected = []
    for k in range(3):
        one, other = parts[:, k] - means
        # The standard deviation of two numbers is half of their distance.
        expected.append(parts[:, k].sum() / 2 - 0.5 * abs(one - other) / 2)
    (found,) = score(tmp_path, records, *words, "--std-weight", "0.5")
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-12)
    # A constant for each prompt says nothing, and an answer without a reward is left
    # out.
    shifted = [parts[0], parts[1] + 7]
    bound = rewards.lower_bound(shifted, 0.5)
    np.testing.assert_allclose(bound, np.array(expected) + 3.5, rtol=1e-12)
    holes = [np.append(parts[0], np.nan), np.append(parts[1], 9.0)]
    bound = rewards.lower_bound(holes, 0.5)
    np.testing.assert_allclose(bound[:3], expected, rtol=1e-12)
    assert np.isnan(bound[3])
    for option in (["--weights", "1", "1"], ["--std-weight", "-1"]):
        with pytest.raises(SystemExit):
            score(tmp_path, records, *words, *option)
    with pytest.raises(SystemExit):
        score(tmp_path, records, *words[:2], *words[4:])
    errors = capsys.readouterr().err
    assert "lower_bound takes the mean" in errors and "std_weight -1" in errors
    assert "--combine lower_bound: needs a second --reward" in errors
    pairs = [{"prompt": "p", "chosen": "a b", "rejected": "c"}]
    with pytest.raises(SystemExit):
        score(tmp_path, pairs, *words)
    assert "1 of 1 records have fewer than 3 answers" in capsys.readouterr().err
    score(tmp_path, [*pairs, *records], *words)
    assert "warning: " in capsys.readouterr().out


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
        "prompt": "p",
        "target": 2,
        "completions": [{"text": "it is 2.0"}],
    }
    assert rule(answered(sampled))[0].tolist() == [1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--answer-field", "target"),
        ("--reference-quantile", "0.5"),
        ("--principle", "be brief"),
        ("--follow-up-model", "m"),
        ("--tests-field", "checks"),
        ("--at-least", "1"),
        ("--constraint-beta", "2"),
    ],
)
def test_an_option_that_no_reward_reads_is_refused(option, value, capsys):
    words = "--data d --out o.jsonl --reward rule:words".split()
    with pytest.raises(SystemExit):
        main(["score", *words, option, value])
    assert option in capsys.readouterr().err


def test_weights_of_each_prompt(tmp_path):
    words = "--reward rule:words --reward rule:characters --weights-field w".split()
    records = [
        {"prompt": "p", "completions": ["a b", "cd"], "w": [1, 0]},
        {"prompt": "p", "completions": ["a b", "cd"], "w": [-1, 2]},
    ]
    first, second = score(tmp_path, records, *words)
    assert first["scores"] == [2, 1] and second["scores"] == [4, 3]
    with pytest.raises(SystemExit):
        score(tmp_path, [records[0] | {"w": [1]}], *words)


def test_multipliers_against_a_general_solver():
    """The policy that they give satisfies the constraints, and no better one does."""
    rng = np.random.default_rng(0)
    sizes, beta = rng.integers(2, 7, 30), 0.3
    draw = lambda: [rng.normal(size=n) for n in sizes]
    first, second, third = draw(), draw(), draw()
    limits = (0.4, -5.0)  # the second one holds anyway
    found = rewards.lagrange_multipliers(first, [second, third], limits, beta=beta)

    def dual(m):
        parts = [
            a + m[0] * (b - limits[0]) + m[1] * (c - limits[1])
            for a, b, c in zip(first, second, third)
        ]
        return np.mean([beta * (logsumexp(x / beta) - np.log(len(x))) for x in parts])

    best = minimize(dual, [1.0, 1.0], bounds=[(0, None)] * 2, tol=1e-14)
    assert found[0] > 0.1 and found[1] == 0
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    policy = [softmax((a + found[0] * b) / beta) for a, b in zip(first, second)]
    means = [np.mean([p @ x for p, x in zip(policy, r)]) for r in (second, third)]
    assert math.isclose(means[0], limits[0], abs_tol=1e-5) and means[1] > limits[1]
    # Rewards of a few units at a small beta: the dual has nearly a kink.
    rng = np.random.default_rng(8)
    for _ in range(40):
        first, second = (rng.normal(size=(6, 4)) * 5 for _ in range(2))
        limit = float(rng.uniform(0, 0.9) * second.max(axis=1).mean())
        found = rewards.lagrange_multipliers(first, [second], (limit,), beta=0.05)
        policy = softmax((first + found[0] * second) / 0.05, axis=1)
        assert (policy * second).sum(axis=1).mean() > limit - 1e-3
    with pytest.raises(ValueError, match="no choice of answers"):
        rewards.lagrange_multipliers(first, [second], (9.0,), beta=beta)


def test_a_reward_under_a_constraint(tmp_path, capsys):
    records = [{"prompt": "p", "answer": "2", "completions": ["a b c 1", "2"]}]
    words = "--reward rule:words --reward rule:number --combine constrained".split()
    (found,) = score(tmp_path, records, *words, "--at-least", "0.5")
    # Both answers must be equally good, so the right one gets 3 words for being right.
    np.testing.assert_allclose(found["scores"], [4, 4], atol=1e-4)
    assert "total = rule:words + 3 * rule:number" in capsys.readouterr().out
    for option in (["--at-least", "2"], [], ["--at-least", "1", "--weights", "1", "1"]):
        with pytest.raises(SystemExit):
            score(tmp_path, records, *words, *option)
    errors = capsys.readouterr().err
    assert "no choice of answers reaches" in errors and "finds them itself" in errors
    assert "one for each of the 1 rewards after the first" in errors


def test_code_passes_its_tests():
    tests = ["assert f(1) == 2", "assert f(2) == 4", "assert f(0) == 1"]
    share = functools.partial(code.share_passed, tests=tests)
    assert share("f = lambda x: 2 * x") == 2 / 3
    assert share("f = lambda x: 2 *") == 0
    assert share("raise SystemExit(0)") == 0 == share("import os; os._exit(0)")
    assert share("f = lambda x: 2 * x if x < 2 else exit()") == 1 / 3


def test_code_has_limits(tmp_path):
    share = functools.partial(code.share_passed, seconds=1)
    slow = "def f(x):\n    while x: pass"
    assert share(slow, ["f(0)", "f(1)", "f(0)"]) == 1 / 3
    assert share("x = bytearray(2 ** 31)", ["True"]) == 0
    large = "open('x', 'w').write(' ' * 2 ** 22)"
    assert share(large, ["True"]) == 0
    # More reports than tests: the code wrote them.
    cheat = "import os, sys\nos.write(int(sys.argv[1]), b'111')"
    assert share(cheat, ["assert False"]) == 0
    # Neither the variables nor the folder of this process.
    assert share(
        "import os; assert 'PATH' not in os.environ", ["assert os.listdir() == []"]
    )
    lasting = "import os, time\nif not os.fork():\n    os.setsid(); time.sleep(4)"
    assert share(lasting, ["True", "assert True"]) == 1


def test_the_code_in_an_answer_runs_only_if_that_is_allowed(tmp_path, capsys):
    answer = "So:\n```python\ndef f(x): return x\n```\nand\n```bash\nrm -r f\n```"
    assert code.code_of(answer) == "def f(x): return x\n"
    assert code.code_of("f = 1") == "f = 1"
    records = [{"prompt": "p", "completions": [answer, "f"], "tests": "assert f(1)"}]
    with pytest.raises(SystemExit):
        score(tmp_path, records, "--reward", "rule:code")
    assert "--allow-code-execution" in capsys.readouterr().err
    words = ["--reward", "rule:code", "--allow-code-execution"]
    (found,) = score(tmp_path, records, *words)
    assert found["scores"] == [1, 0]
    with pytest.raises(SystemExit):
        score(tmp_path, records, *words, "--tests-field", "checks")
    assert "row 1" in (error := capsys.readouterr().err) and "'checks'" in error
