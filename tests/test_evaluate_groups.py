"""`jaxpref evaluate --by` and `--against`, against plain numpy and scipy."""

import json

import numpy as np
import pytest
import scipy.stats

from jaxpref.cli import evaluate as evaluate_command
from jaxpref.errors import InputError
from jaxpref.evaluate import baselines
from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.groups import by_group, length_bins
from jaxpref.evaluate.metrics import preference_metrics
from jaxpref.evaluate.paired import mcnemar_exact, paired_metrics
from jaxpref.evaluate.signal_noise import signal_and_noise
from tests.tiny import make_model_folder, make_pairs_file


def test_mcnemar_is_the_binomial_test_of_the_disagreements():
    for b in range(12):
        for c in range(12):
            if b + c:
                expected = scipy.stats.binomtest(b, b + c).pvalue
                assert mcnemar_exact(b, c) == pytest.approx(expected)
    assert mcnemar_exact(0, 0) == 1
    # Larger than any float's binomial coefficient.
    expected = scipy.stats.binomtest(5300, 10300).pvalue
    assert mcnemar_exact(5300, 5000) == pytest.approx(expected)


def test_a_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 3, (2, 200)) / 2
    found = paired_metrics(one, two, np.arange(200))
    assert found["difference"] == pytest.approx(one.mean() - two.mean())
    assert found["only_model"] == np.sum((one == 1) & (two == 0))
    assert found["only_baseline"] == np.sum((one == 0) & (two == 1))
    interval = scipy.stats.bootstrap(
        (one - two,), np.mean, method="percentile", rng=rng, n_resamples=4000
    ).confidence_interval
    ends = found["difference_low"], found["difference_high"]
    assert ends == pytest.approx(interval, abs=0.02)
    same = paired_metrics(one, one, np.arange(200))
    assert same["difference_low"] == same["difference_high"] == 0
    assert same["mcnemar_p"] == 1
    with pytest.raises(ValueError, match="equal shapes"):
        paired_metrics(one, two[1:], np.arange(200))


def test_length_bins_divide_both_signs_at_their_medians():
    found = length_bins(np.array([5, 1, 2, 9, 0, -3, -3, -8]))
    assert found == [
        *("4 or more", "1 to 3", "1 to 3", "4 or more", "0"),
        *("-3 to -1", "-3 to -1", "-4 or less"),
    ]
    assert length_bins(np.zeros(2, int)) == ["0", "0"]


def test_the_statistics_of_a_group_are_those_of_its_records_alone():
    rng = np.random.default_rng(1)
    margins, prompts = rng.normal(size=60), np.arange(60) // 3
    groups = [["2", "10", "b c"][n] for n in rng.integers(0, 3, 60)]
    hits = 0.5 + 0.5 * np.sign(margins)
    found = by_group(groups, hits, prompts, margins)
    assert [*found] == ["2", "10", "b c"]  # numbers in their order
    for name, one in found.items():
        alone = preference_metrics(margins[np.array(groups) == name])
        assert one == {
            "count": alone["pairs"],
            "accuracy": alone["rewards/accuracies"],
            "low": alone["rewards/accuracies_low"],
            "high": alone["rewards/accuracies_high"],
            "margin": alone["rewards/margins"],
            "ece": alone["calibration/ece"],
            "brier": alone["calibration/brier"],
        }
    own = np.array(groups) == "2"
    mean = lambda weights: {"a": weights @ hits[own] / weights.sum()}
    ends = [*prompt_bootstrap(mean, prompts[own]).values()]
    assert [*by_group(groups, hits, prompts)["2"].values()] == [own.sum(), *ends]


# ---- the command ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models, and 20 pairs with fields to group by."""
    folder = tmp_path_factory.mktemp("groups")
    make_model_folder(folder / "lm")
    make_model_folder(folder / "other", 1)
    rows = make_pairs_file(folder / "pairs.jsonl", 20).read_text().splitlines()
    more = [
        {"subset": "abc"[n % 3], "meta": {"level": n % 2}, "annotator": f"a{n % 4}"}
        for n in range(20)
    ]
    more[4]["subset"] = None
    lines = [json.dumps(json.loads(x) | y) + "\n" for x, y in zip(rows, more)]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def evaluate(inputs, out, *flags, model="lm"):
    words = f"--model {inputs / model} --data {inputs / 'pairs.jsonl'} --out {out}"
    words += f" --max-length 64 --batch-size 8 {' '.join(map(str, flags))}"
    evaluate_command.command(words.split())
    lines = (out / "eval_pairs.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), [*map(json.loads, lines)]


def test_by_groups_the_records_by_their_fields(inputs, tmp_path, capsys):
    flags = ("--by", "subset,meta.level,annotator", "length-bin")
    metrics, lines = evaluate(inputs, tmp_path, *flags)
    by = metrics["by"]
    assert [*by] == ["subset", "meta.level", "annotator", "length-bin"]
    values = {
        "subset": [None if n == 4 else "abc"[n % 3] for n in range(20)],
        "meta.level": [str(n % 2) for n in range(20)],
        "annotator": [f"a{n % 4}" for n in range(20)],
    }
    for field, own in values.items():
        assert set(by[field]) == {x or "none" for x in own}
        for name, one in by[field].items():
            hits = [x["correct"] for x, y in zip(lines, own) if (y or "none") == name]
            assert one["count"] == len(hits)
            assert one["accuracy"] == pytest.approx(np.mean(hits))
            assert one["low"] < one["accuracy"] < one["high"] or len(set(hits)) == 1
    assert sum(x["count"] for x in by["length-bin"].values()) == 20
    printed = capsys.readouterr().out
    assert "meta.level" in printed and "ece" in printed
    page = (tmp_path / "evaluation.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "By meta.level" in page
    assert "Likelihood displacement" in page
    assert "http" not in page.replace("http-equiv", "")
    card = (tmp_path / "evaluation.md").read_text().splitlines()
    shown = f"| {metrics['rewards/accuracies']:.4f} |"
    (row,) = [x for x in card if x.startswith("| rewards/accuracies |")]
    assert shown in row and f"{metrics['rewards/accuracies_low']:.3f} to" in row
    assert any(x.startswith("| accuracy, subset a |") for x in card)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("subsets", r"no record of .* has this field; did you mean subset\?"),
        ("meta", "field 'meta' holds dict.*--by meta.level"),
    ],
)
def test_a_field_that_groups_nothing_is_one_line(inputs, tmp_path, field, message):
    with pytest.raises(InputError, match=message):
        evaluate(inputs, tmp_path, "--by", field)
    assert not (tmp_path / "metrics.json").exists()


def test_against_compares_two_models_on_the_same_pairs(inputs, tmp_path, capsys):
    metrics, lines = evaluate(inputs, tmp_path, "--against", inputs / "other")
    alone, others = evaluate(inputs, tmp_path / "other", model="other")
    found = metrics["against"]
    hits, baseline = ([x["correct"] for x in rows] for rows in (lines, others))
    assert found["model"] == str(inputs / "other") and found["count"] == 20
    assert found["accuracy"] == metrics["rewards/accuracies"] == np.mean(hits)
    assert found["baseline_accuracy"] == alone["rewards/accuracies"]
    b = sum(x and not y for x, y in zip(hits, baseline))
    c = sum(y and not x for x, y in zip(hits, baseline))
    assert (found["only_model"], found["only_baseline"]) == (b, c)
    expected = scipy.stats.binomtest(b, b + c).pvalue
    assert found["mcnemar_p"] == pytest.approx(expected)
    assert "McNemar's p" in capsys.readouterr().out


def test_difficulties_are_the_losses_at_which_the_order_turns(inputs, tmp_path):
    flags = ("--reference", inputs / "other", "--beta", 0.5)
    metrics, lines = evaluate(inputs, tmp_path, *flags)
    own, before = (
        np.array([x[f"{name}_chosen"] - x[f"{name}_rejected"] for x in lines])
        for name in ("logps", "reference_logps")
    )
    difficulty = np.log1p(np.exp(0.5 * before))
    np.testing.assert_allclose([x["difficulty"] for x in lines], difficulty, rtol=1e-5)
    assert metrics["ranking/accuracies"] == pytest.approx(np.mean(own >= 0))
    loss = np.log1p(np.exp(-0.5 * (own - before)))  # DPO's
    np.testing.assert_array_equal(own >= 0, loss <= difficulty)
    assert metrics["ranking/reference_accuracies"] == pytest.approx(
        np.mean(before >= 0)
    )
    best = before + np.log(0.999 / 0.001) / 0.5 > 0
    assert metrics["ranking/idealized_accuracies"] == pytest.approx(best.mean())
    alone, lines = evaluate(inputs, tmp_path / "alone")
    assert "ranking/difficulty" not in alone and "difficulty" not in lines[0]
    assert alone["ranking/accuracies"] == metrics["ranking/accuracies"]


def test_a_missing_text_baseline_is_said(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "missing", lambda: ("tfidf_lengths",))
    metrics, _ = evaluate(inputs, tmp_path, "--text-baseline")
    assert "They need scikit-learn" in "".join(capsys.readouterr())
    assert "tfidf_lengths/accuracies" not in metrics


def test_the_text_baseline_is_out_of_fold(monkeypatch):
    answers = [("long answer", "short"), ("a", "bc"), ("d", "e"), ("fgh", "i")] * 5
    seen = []

    def margins(answers, folds):
        seen.append(folds)
        return np.array([len(x) - len(y) for x, y in answers], float)

    monkeypatch.setattr(baselines, "missing", tuple)
    monkeypatch.setattr(baselines, "tfidf_lengths", margins)
    prompts = [f"q{n // 2}" for n in range(20)]
    found = baselines.text_baseline(answers, prompts)
    assert found is not None
    assert found["tfidf_lengths/accuracies"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["tfidf_lengths/accuracies_low"] < 0.625
    (folds,) = seen
    assert len(set(folds.tolist())) == 5
    assert (folds[::2] == folds[1::2]).all()  # pairs with the same prompt


def test_signal_and_noise_are_those_of_the_published_code():
    scores = {"a": [0.5, 0.7, 0.6], "b": [0.8], "c": [0.4, 0.5]}
    found = signal_and_noise(scores)
    last = np.array([0.6, 0.8, 0.5])
    signal = max(abs(x - y) for x in last for y in last) / last.mean()
    noises = [np.std(x) / np.mean(x) for x in ([0.5, 0.7, 0.6], [0.4, 0.5])]
    assert found["signal"] == pytest.approx(signal)
    assert found["noise"] == pytest.approx(np.mean(noises))
    assert found["signal_to_noise"] == pytest.approx(signal / np.mean(noises))
    alone = signal_and_noise({"a": [0.5]})
    assert set(alone.values()) == {None}
    with pytest.raises(ValueError, match="at least one score"):
        signal_and_noise({"a": []})


def test_checkpoints_are_scored_with_one_program(inputs, tmp_path, capsys):
    flags = ("--checkpoints", inputs / "other", inputs / "lm")
    metrics, lines = evaluate(inputs, tmp_path, *flags)
    other, _ = evaluate(inputs, tmp_path / "other", model="other")
    found = metrics["checkpoints"]
    expected = {
        str(inputs / "lm"): metrics["rewards/accuracies"],
        str(inputs / "other"): other["rewards/accuracies"],
    }
    assert found["accuracies"] == expected
    assert found["noise"] is None and found["signal"] > 0
    assert "signal: " in capsys.readouterr().out
    make_model_folder(tmp_path / "wide", hidden_size=32)
    with pytest.raises(InputError, match="another architecture than --model"):
        evaluate(inputs, tmp_path, "--checkpoints", tmp_path / "wide")
