"""`jaxpref compare` and its statistics, against scipy and plain numpy."""

import itertools
import json

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from scipy.special import expit

from jaxpref import rewards
from jaxpref.cli.main import main
from jaxpref.data import ListSource, RecordOptions, load_tokenizer
from jaxpref.errors import InputError
from jaxpref.evaluate.compare import (
    bradley_terry,
    length_controlled_win_rate,
    style_features,
    win_rate,
)
from jaxpref.evaluate.compare import command as compare_command
from jaxpref.evaluate.compare.answers import (
    Key,
    ModelAnswers,
    read_models,
    shared_keys,
)
from jaxpref.evaluate.compare.length_control import PENALTIES, fit
from jaxpref.evaluate.compare.style_control import style_differences
from jaxpref.evaluate.compare.verdicts import Verdicts, judged, read_verdicts
from jaxpref.evaluate.compare.win_rate import consistent, swap_metrics
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.report.win_rates import verdict
from jaxpref.rewards import Judge
from jaxpref.rewards.judge import wins
from tests.tiny import make_model_folder, tiny_config, tiny_params


def test_a_win_rate_and_its_interval():
    p = np.array([1.0, 0.5, 0.2, 0.9, 0.5, 0.0])
    found = win_rate(p, np.arange(6))
    assert found["win_rate"] == pytest.approx(p.mean())
    assert found["discrete_win_rate"] == pytest.approx((2 + 2 / 2) / 6)
    assert [found[x] for x in ("wins", "ties", "losses")] == [2 / 6, 2 / 6, 2 / 6]
    near = win_rate(p, np.arange(6), tie_margin=0.3)
    assert near["ties"] == pytest.approx(3 / 6)
    # A comparison of weight 3 counts like three.
    weighted = win_rate(p, np.arange(6), weights=np.array([3, 1, 1, 1, 1, 1]))
    assert weighted["win_rate"] == pytest.approx((p.sum() + 2 * p[0]) / 8)
    rng = np.random.default_rng(0)
    many = rng.random(500)
    found = win_rate(many, np.arange(500))
    error = many.std() / np.sqrt(500)
    width = found["win_rate_high"] - found["win_rate_low"]
    assert width == pytest.approx(3.92 * error, rel=0.1)
    with pytest.raises(ValueError, match="none that is NaN"):
        win_rate(np.array([np.nan]), np.arange(1))


def test_swapped_verdicts_are_compared():
    first, second = np.array([0.9, 0.9, 0.2, 0.5]), np.array([0.8, 0.1, 0.4, 0.6])
    found = swap_metrics(first, second)
    assert found["consistency"] == 0.5
    # The answer in front gets `first` and, in the other order, 1 - `second`.
    in_front = np.concatenate([first, 1 - second])
    assert found["first_position"] == pytest.approx(in_front.mean())
    np.testing.assert_array_equal(consistent(first, second), [1, 0.5, 0, 0.5])


def draw_preferences(seed, count=120):
    """Preferences of a judge that likes long answers, and the lengths."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(50, 900, (2, count)).astype(float)
    longer = (lengths - others) / np.std(lengths - others, ddof=1)
    p = expit(0.4 + 1.2 * np.tanh(longer))
    return rng.binomial(8, p) / 8, lengths, others


@pytest.mark.parametrize("penalty", [PENALTIES[2], 1.0, 1e4])
def test_the_coefficients_minimize_the_published_objective(penalty):
    """Fitted again by another method, from the formula."""
    y, lengths, others = draw_preferences(0)
    d = lengths - others
    x = np.stack([np.ones(len(y)), np.tanh(d / np.std(d, ddof=1))], axis=1)
    w = np.random.default_rng(1).integers(1, 4, len(y)).astype(float)

    def objective(b):
        p = expit(x @ b)
        entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p))
        return np.abs(b).sum() + penalty * np.sum(w * entropy)

    found = fit(x, y, w, penalty)
    again = scipy.optimize.minimize(
        objective, [0.1, 0.1], method="Nelder-Mead", options={"xatol": 1e-9}
    )
    assert objective(found) <= again.fun * (1 + 1e-9)
    np.testing.assert_allclose(found, again.x, atol=1e-4)


def test_the_length_controlled_win_rate_is_the_prediction_at_equal_lengths():
    y, lengths, others = draw_preferences(2)
    found = length_controlled_win_rate(y, lengths, others, resamples=20)
    assert found.penalty in PENALTIES
    assert found.win_rate == pytest.approx(expit(found.model))
    assert found.interval[0] < found.win_rate < found.interval[1]
    # A model whose answers are all longer wins by its length; not at equal lengths.
    d = np.random.default_rng(3).normal(300, 200, 500)
    y = expit(1.5 * np.tanh(d / d.std(ddof=1)))
    one, two = d + 1000, np.full(500, 1000.0)
    found = length_controlled_win_rate(y, one, two, resamples=0)
    assert y.mean() > 0.65
    assert found.win_rate == pytest.approx(0.5, abs=1e-3)
    assert found.length == pytest.approx(1.5, abs=5e-3)
    # Exchanging the models turns it around.
    other = length_controlled_win_rate(1 - y, two, one, resamples=0)
    assert other.win_rate == pytest.approx(1 - found.win_rate, abs=1e-5)


def test_difficulties_are_averaged_over():
    rng = np.random.default_rng(4)
    g, d = rng.normal(size=(2, 800))
    y = expit(0.3 + 0.8 * np.tanh(d / d.std(ddof=1)) - 0.7 * g)
    found = length_controlled_win_rate(y, d, np.zeros(800), difficulties=g, resamples=0)
    assert found.win_rate == pytest.approx(expit(0.3 - 0.7 * g).mean(), abs=2e-3)
    assert found.difficulty == pytest.approx(-0.7, abs=0.01)
    same = length_controlled_win_rate(y, d, d, resamples=0)  # no difference at all
    assert same.win_rate == pytest.approx(y.mean(), abs=1e-3)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        length_controlled_win_rate(2 * y, d, d)


def test_strengths_minimize_the_penalized_likelihood():
    rng = np.random.default_rng(5)
    battles = np.array([[0, 1], [0, 2], [1, 2]] * 60)
    style = rng.normal(size=(180, 2))
    y = rng.binomial(1, expit(0.8 * (battles[:, 1] - battles[:, 0]) + style[:, 0]))
    found = bradley_terry(
        battles, y, np.arange(180) // 3, models=3, style=style, resamples=20
    )

    def objective(x):
        r, c = x[:3], x[3:]
        p = expit(r[battles[:, 0]] - r[battles[:, 1]] + style @ c)
        loss = -np.sum(y * np.log(p) + (1 - y) * np.log(1 - p))
        return loss + 0.5e-3 * np.sum(x**2)

    again = scipy.optimize.minimize(objective, np.zeros(5), tol=1e-10).x
    expected = 1000 + 400 * again[:3] / np.log(10)
    np.testing.assert_allclose(found.ratings, expected, atol=0.05)
    np.testing.assert_allclose(found.coefficients, again[3:], atol=1e-3)
    assert found.ratings.mean() == pytest.approx(1000, abs=0.05)
    assert (found.low < found.ratings).all() and (found.ratings < found.high).all()
    # A model that wins every battle has a finite strength.
    sure = bradley_terry(battles, np.ones(180), np.arange(180), models=3, resamples=2)
    assert np.isfinite(sure.ratings).all()


def test_features_of_style_are_relative_and_standardized():
    one = style_features(["# A\n- b\n- c\n1. d\n**e** __f__", ""])
    np.testing.assert_array_equal(one, [[28, 1, 3, 2], [0, 0, 0, 0]])
    two = np.array([[9.0, 0, 3, 0], [4, 0, 0, 0]])
    x = (one - two) / (one + two + 1)
    expected = np.nan_to_num(x / np.sqrt(np.mean(x**2, axis=0)))
    np.testing.assert_allclose(style_differences(one, two), expected, atol=1e-12)


def test_models_that_differ_in_length_alone_are_equally_strong_in_any_order():
    rng = np.random.default_rng(0)
    sizes = np.array([300.0, 200.0, 100.0])
    for order in itertools.permutations(range(3)):
        battles, wins, features = [], [], []
        for _ in range(400):
            own = sizes * rng.lognormal(0, 0.5, 3)
            for i, j in itertools.combinations(order, 2):
                x = (own[i] - own[j]) / (own[i] + own[j] + 1)
                battles.append((order.index(i), order.index(j)))
                wins.append(float(rng.random() < 1 / (1 + np.exp(-3 * x))))
                features.append([[own[i], 0, 0, 0], [own[j], 0, 0, 0]])
        one, two = np.array(features).transpose(1, 0, 2)
        found = bradley_terry(
            np.array(battles),
            np.array(wins),
            np.arange(len(wins)),
            models=3,
            style=style_differences(one, two),
            resamples=2,
        )
        assert np.abs(found.ratings - 1000).max() < 45  # without control: 100


# ---- files ---------------------------------------------------------------------------


def write(path, rows, *, lines=None):
    is_lines = path.suffix == ".jsonl" if lines is None else lines
    text = "".join(json.dumps(x) + "\n" for x in rows) if is_lines else json.dumps(rows)
    path.write_text(text)
    return str(path)


def test_answers_of_three_kinds_of_files_are_matched(tmp_path):
    alpaca = [
        {"instruction": f"q{n}", "output": f"a{n}", "generator": "A", "logp": -1.5}
        for n in (0, 1, 1)
    ]
    sampled = [
        {
            "prompt": f"q{n}",
            "completions": [{"text": f"b{n}.{k}", "ended": k == 0} for k in range(2)],
            "generator": "B",
        }
        for n in (1, 2)
    ]
    turns = [
        {"role": "user", "content": "q1 "},
        {"role": "assistant", "content": {"answer": "c1"}},
    ]
    arena = [{"messages": turns, "model": "C"}]
    paths = [
        write(tmp_path / "a.json", alpaca),
        write(tmp_path / "b.jsonl", sampled),
        write(tmp_path / "c.jsonl", arena),
    ]
    models = read_models(paths)
    assert [one.name for one in models] == ["A", "B", "C"]
    assert shared_keys(models[:2]) == [Key("q1", 0), Key("q1", 1)]
    assert shared_keys(models) == [Key("q1", 0)]
    texts = [one.answers[Key("q1", 0)].text for one in models]
    assert texts == ["a1", "b1.0", "c1"]
    assert models[0].answers[Key("q0", 0)].logp == -1.5
    assert not models[1].answers[Key("q2", 1)].ended
    with pytest.raises(InputError, match="share no prompt"):
        other = write(tmp_path / "d.json", [{"instruction": "x", "output": "y"}])
        shared_keys(read_models([paths[0], other]))
    mixed = [*alpaca, alpaca[0] | {"generator": "Z"}]
    with pytest.raises(InputError, match="row 4: is an answer of 'Z'"):
        read_models([write(tmp_path / "e.json", mixed)])
    with pytest.raises(InputError, match="row 1: has no answer; give 'instruction'"):
        read_models([write(tmp_path / "f.json", [{"prompt": "x"}])])
    old = {"question_id": "u1", "model_id": "m", "choices": [{"turns": [{}]}]}
    old["choices"][0]["turns"][0]["content"] = "text"
    (one,) = read_models([write(tmp_path / "g.jsonl", [old])])
    assert one.answers[Key("u1", 0)].prompt is None and one.name == "m"
    with pytest.raises(InputError, match=r"names its question without the text"):
        judged(lambda x: [], [one, one], [Key("u1", 0)], name="--judge x")


def two_models(tmp_path, texts, others):
    rows = lambda name, texts: [
        {"instruction": f"q{n}", "output": x, "generator": name}
        for n, x in enumerate(texts)
    ]
    return [
        write(tmp_path / "one.json", rows("one", texts)),
        write(tmp_path / "two.json", rows("two", others)),
    ]


def test_verdicts_of_alpaca_eval_and_of_arena_hard(tmp_path):
    models = read_models(two_models(tmp_path, "abcd", "efgh"))
    keys = shared_keys(models)
    annotation = {"generator_1": "two", "generator_2": "one"}
    rows = [
        annotation | {"instruction": f"q{n}", "preference": x}
        for n, x in enumerate([2, 1.25, 0, None])
    ]
    found = read_verdicts(write(tmp_path / "v.json", rows), models, keys)
    np.testing.assert_allclose(found.preferences(0, 1), [1, 0.25, 0.5, np.nan])
    np.testing.assert_allclose(found.preferences(1, 0), [0, 0.75, 0.5, np.nan])
    assert not found.depends_on_order
    with pytest.raises(InputError, match="row 1: field 'preference' must be a numb"):
        bad = [rows[0] | {"preference": 3}]
        read_verdicts(write(tmp_path / "v.json", bad), models, keys)

    # As the published script: a score for each game, strong ones three times.
    games = [("A>B", "A>>B"), ("B>>A", "A=B"), ("A=B", "A=B"), ("A>B", "A>B")]
    rows = [
        {"uid": f"q{n}", "model": "one", "games": [{"score": x}, {"score": y}]}
        for n, (x, y) in enumerate(games)
    ]
    found = read_verdicts(write(tmp_path / "j.jsonl", rows), models, keys)
    exploded = [1, 1, 1, 0, 0.5, 1, 1, 1, 0.5, 0.5, 1, 0]
    p, w = found.preferences(0, 1), found.weights[:, 0, 1]
    assert (p @ w) / w.sum() == pytest.approx(np.mean(exploded))
    assert found.depends_on_order  # the last one prefers what is read first
    # Both orders are kept, also if one verdict is stronger.
    np.testing.assert_array_equal(found.first[:, 0, 1], [1, 0.5, 0.5, 1])
    np.testing.assert_array_equal(1 - found.first[:, 1, 0], [0, 1, 0.5, 0])
    # Judgments of a third model leave the weights of this one alone.
    three = [*models, ModelAnswers("three", "t.json", models[0].answers)]
    others = [
        row | {"model": "three", "baseline": "two", "games": [{"score": "A=B"}] * 2}
        for row in rows
    ]
    rows = [row | {"baseline": "two"} for row in rows]
    both = read_verdicts(write(tmp_path / "j.jsonl", rows + others), three, keys)
    np.testing.assert_array_equal(both.weights[:, 0, 1], w)
    np.testing.assert_array_equal(both.weights[:, 2, 1], 2)
    with pytest.raises(InputError, match="must be one of A>>B"):
        rows[0]["games"][0]["score"] = "A"
        read_verdicts(write(tmp_path / "j.jsonl", rows), models, keys)


def test_a_judge_is_asked_in_both_orders(monkeypatch):
    first = np.array([[np.nan, 0.9, 0.6], [0.4, np.nan, 0.5], [0.2, 0.7, np.nan]])
    monkeypatch.setattr(Judge, "first_is_better", lambda self, x: [first] * len(x))
    expected = [
        np.mean([(first[i, j] + 1 - first[j, i]) / 2 for j in range(3) if j != i])
        for i in range(3)
    ]
    np.testing.assert_allclose(wins(first), expected)
    found = Verdicts(first[None], np.ones((1, 3, 3)))
    assert found.preferences(0, 1) == pytest.approx([(0.9 + 0.6) / 2])
    assert found.depends_on_order


# ---- the command ---------------------------------------------------------------------


def compare(tmp_path, files, *words):
    out = tmp_path / "out"
    main(["compare", *map(str, files), "--out", str(out), *map(str, words)])
    lines = (out / "verdicts.jsonl").read_text().splitlines()
    page = (out / "compare.html").read_text()
    return (
        json.loads((out / "compare.json").read_text()),
        [*map(json.loads, lines)],
        page,
    )


def test_two_models_are_compared_by_a_rule(tmp_path, capsys):
    texts = ["one two three", "one", "a b", "**b** <script>", "x y z w"]
    others = ["one two", "one two", "c d", "d", "x"]
    files = two_models(tmp_path, texts, others)
    summary, lines, page = compare(
        tmp_path, files, "--judge", "rule:words", "--gold", "rule:characters"
    )
    signs = [1, -1, 0, 1, 1]
    p = [0.5 + 0.5 * x for x in signs]
    assert summary["win_rate"] == pytest.approx(np.mean(p))
    assert (summary["model"], summary["baseline"]) == ("one", "two")
    assert [x["preference"] for x in lines] == [1 + x for x in p]
    assert [verdict(x) for x in lines] == ["wins", "loses", "tie", "wins", "wins"]
    low, high = summary["win_rate_interval"]
    assert low < summary["win_rate"] < high
    assert 0 < summary["length_controlled_win_rate"] < 1
    gold = [0.5 + 0.5 * np.sign(len(x) - len(y)) for x, y in zip(texts, others)]
    against = summary["judge_minus_gold"]
    assert against["difference"] == pytest.approx(np.mean(p) - np.mean(gold))
    assert against["agreement"] == np.mean(np.sign(np.subtract(gold, 0.5)) == signs)
    assert summary["kl"] == {"one": None, "two": None}
    assert summary["models"][0]["reward"] == pytest.approx(
        np.mean([len(x.split()) for x in texts])
    )
    assert "&lt;script&gt;" in page and page.count("<script>") == 1
    assert "win rate 70.0%" in capsys.readouterr().out
    # What it writes can be read as verdicts, and gives the same numbers.
    verdicts = ("--verdicts", tmp_path / "out" / "verdicts.jsonl")
    main(["compare", *files, "--out", str(tmp_path / "again"), *map(str, verdicts)])
    again = json.loads((tmp_path / "again" / "compare.json").read_text())
    for name in ("win_rate", "win_rate_interval", "length_controlled_win_rate"):
        assert again[name] == summary[name]


def test_answers_are_compared_without_their_reasoning(tmp_path):
    finals = ["two words", "a b c", "", "x"]
    texts = [f"so long a thought </think>\n {x}" for x in finals]
    texts[2] = "a thought without an end"
    others = ["</think>one", "</think> a b </think> c", "</think>y z", "</think>y z"]
    files = two_models(tmp_path, texts, others)
    words = ("--judge", "rule:words", "--answer-after", "</think>")
    summary, lines, _ = compare(tmp_path, files, *words)
    assert [x["output_2"] for x in lines] == finals
    assert [x["output_1"] for x in lines] == ["one", "a b </think> c", "y z", "y z"]
    assert [x["preference"] for x in lines] == [2, 1, 1, 1]
    assert [x["without_answer"] for x in summary["models"]] == [1, 0]
    with pytest.raises(SystemExit):  # the baseline does not reason
        compare(tmp_path, two_models(tmp_path, texts, finals), *words)
    # The KL divergence is that of the whole answers.
    rows = [
        {"instruction": str(n), "output": x, "generator": "g", "logp": -3.0}
        for n, x in enumerate(texts)
    ]
    rows = [row | {"reference_logp": -5.0} for row in rows]
    files = [write(tmp_path / name, rows) for name in ("a.json", "b.json")]
    summary, *_ = compare(tmp_path, files, *words)
    assert set(summary["kl"].values()) == {2.0}


def test_an_answer_that_is_cut_off_while_thinking_loses(tmp_path, monkeypatch, capsys):
    """Although a reward model gives an empty answer no score."""
    score = lambda text: float(len(text)) if text else np.nan
    read = lambda asked: [np.array([*map(score, one.texts)]) for one in asked]
    monkeypatch.setattr(compare_command, "reward_of", lambda *_: read)
    texts = ["a </think> long", "thinking", "a </think> long", "", "thinking"]
    others = ["b </think> x", "b </think> x", "", "b </think> x", "thinking"]
    files = two_models(tmp_path, texts, others)
    words = ("--judge", "rm", "--answer-after", "</think>")
    summary, lines, page = compare(tmp_path, files, *words)
    assert [x["preference"] for x in lines] == [2, 1, 2, 1, 1.5]
    assert summary["win_rate"] == 0.5 and summary["not_judged"] == 0
    assert [x["rewards"] for x in lines[:2]] == [[1, 4], [1, None]]
    assert ">empty<" in page
    assert "one: 3 of 5 answers have no text after" in "".join(capsys.readouterr())


def test_many_models_have_strengths_with_control_for_style(tmp_path):
    rng = np.random.default_rng(6)
    files = []
    for k, name in enumerate("abc"):
        rows = [
            {
                "instruction": f"q{n}",
                "output": "word " * int(rng.integers(1, 6 + 3 * k)) + "- x\n" * k,
                "generator": name,
                "logp": -3.0 - k,
                "reference_logp": -5.0,
            }
            for n in range(30)
        ]
        files.append(write(tmp_path / f"{name}.json", rows))
    summary, lines, page = compare(tmp_path, files, "--judge", "rule:words")
    assert [x["model"] for x in summary["pairs"]] == ["a", "b"]
    assert len(lines) == 60
    found = summary["bradley_terry"]
    plain = [found["plain"][x]["rating"] for x in "abc"]
    assert plain == sorted(plain)  # longer answers have more words
    assert found["style"]["length"] > 0
    assert summary["kl"] == {"a": 2.0, "b": 1.0, "c": 0.0}
    assert "Strengths" in page


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--judge", "rule:words"], ["at least two models"]),
        (["a.json", "b.json"], ["--judge: name a reward model"]),
        (["a.json", "a.json", "--judge", "x"], ["given twice"]),
        (["a.json", "b.json", "--judge", "x", "--principle", "y"], ["only judge:DIR"]),
        (
            ["a.json", "b.json", "--judge", "x", "--answers", "c"],
            ["before the options"],
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, words, fragments):
    if "a.json" not in words:
        words = ["a.json", *words]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert all(x in error for x in fragments) and "Traceback" not in error


def test_a_file_of_another_program_is_not_overwritten(tmp_path):
    files = two_models(tmp_path, "ab", "cd")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text('{"mine": 1}')
    with pytest.raises(SystemExit):
        compare(tmp_path, files, "--judge", "rule:words")
    assert (tmp_path / "out" / "compare.json").read_text() == '{"mine": 1}'


@pytest.mark.slow
def test_models_judge_answers_and_give_divergences(tmp_path):
    """A reward model, a language model in both orders, and the model before."""
    make_model_folder(tmp_path / "lm", max_position_embeddings=512)
    model = RewardModel(tiny_config())
    save(tmp_path / "rm", model, tiny_params(model), tmp_path / "lm")
    texts = [" good film", " great", " dull"]
    others = [" bad", " cold food", " fine"]
    prompts = ["the film", "a meal", "the book"]
    files = []
    for name, own in (("one", texts), ("two", others)):
        rows = [
            {"instruction": x, "output": y, "generator": name, "logp": -4.0}
            for x, y in zip(prompts, own)
        ]
        files.append(write(tmp_path / f"{name}.json", rows))
    lm, rm = tmp_path / "lm", tmp_path / "rm"
    flags = ("--judge", rm, "--gold", f"judge:{lm}", "--reference", lm)
    summary, lines, _ = compare(tmp_path, files, *flags)

    def scored(word, own):
        records = [
            {"prompt": x, "completions": [*y]}
            for x, y in zip(prompts, own, strict=True)
        ]
        reward = rewards.reward_of(word, rewards.ModelOptions())
        source = ListSource(records)
        return np.stack(reward(rewards.read_answered(source, RecordOptions())))

    both = [*zip(texts, others)]
    table = scored(str(rm), both)
    expected = np.mean(0.5 + 0.5 * np.sign(table[:, 0] - table[:, 1]))
    assert summary["win_rate"] == pytest.approx(expected)
    np.testing.assert_allclose([x["rewards"] for x in lines], table[:, ::-1])
    gold = summary["judge_minus_gold"]["gold_win_rate"]
    assert gold == pytest.approx(scored(f"judge:{lm}", both)[:, 0].mean(), abs=1e-5)
    # The log-ratio of a model to itself is 0, so log-probs come from another path.
    alone = score_logps(lm, prompts, texts)
    assert summary["kl"]["one"] == pytest.approx(np.mean(-4.0 - alone), abs=1e-3)


def score_logps(folder, prompts, texts):
    """log p(text, EOS | prompt) of each, one sequence at a time."""
    network = build(read_architecture(folder))
    params, tokenizer = load_params(folder, network), load_tokenizer(folder)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        before = [tokenizer.bos_token_id, *ids(prompt)]
        whole = np.array([*before, *ids(text), tokenizer.eos_token_id])
        logits = np.asarray(network.logits(params, whole[None]), float)[0]
        each = scipy.special.log_softmax(logits[:-1], axis=-1)
        picked = each[np.arange(len(whole) - 1), whole[1:]]
        found.append(picked[len(before) - 1 :].sum())
    return np.array(found)
