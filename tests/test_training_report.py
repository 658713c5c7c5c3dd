"""The report of a training run: its curves, its page, and what a run prints."""

import json
import math
import re
import subprocess
import sys

import matplotlib.figure
import numpy as np
import pytest

from jaxpref.errors import InputError
from jaxpref.report import write_training
from jaxpref.report.curves import running_mean
from jaxpref.report.progress import (
    duration,
    evaluation_line,
    notable_evaluations,
    summary_lines,
)
from jaxpref.report.training import read_records

CONFIG = {
    "model": "models/small",
    "data": "data/pairs.jsonl",
    "max_steps": 4,
    "log_every": 1,
    "keep_best": None,
    "optimizer": {"learning_rate": 1e-6, "warmup_steps": 0},
    "loss": {"name": "dpo", "beta": 0.1},
}


def evaluation(step, loss, accuracy=0.5, margin=0.0, **more):
    return {
        "step": step,
        "eval_loss": loss,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": margin,
        **more,
    }


def training(step, loss, accuracy=0.5, margin=0.0, **more):
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 2.0,
        "learning_rate": 1e-6,
        "rewards/accuracies": accuracy,
        "rewards/margins": margin,
        **more,
    }


RUN = [
    evaluation(0, 0.693),
    training(1, 0.69),
    training(2, 0.68, 0.625, 0.02, pairs_per_second=10.0),
    evaluation(2, 0.61, 0.642, 0.312),
    training(3, 0.65, 0.75, 0.03, pairs_per_second=30.0),
    training(4, 0.64, 0.5, 0.04, pairs_per_second=12.5),
    evaluation(4, 0.62, 0.65, 0.4),
]


def write(out, records, config=CONFIG, end=""):
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (out / "metrics.jsonl").write_text(lines + end, "utf-8")
    return out


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, in order."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def panels(figure):
    """Title -> label -> points of the lines in the legend."""
    return {
        axes.get_title(loc="left"): {
            line.get_label(): line.get_xydata().tolist()
            for line in axes.lines
            if not line.get_label().startswith("_")
        }
        for axes in figure.axes
        if axes.get_visible()
    }


def page(out):
    """The page's text without its figures, tags taken out, whitespace joined."""
    text = (out / "report.html").read_text("utf-8")
    body = re.sub(r"<[^>]*>", " ", text.partition("<body>")[2])
    return " ".join(body.split())


def headings(out):
    text = (out / "report.html").read_text("utf-8")
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_the_curves_show_training_and_evaluation(tmp_path, drawn):
    out = write(tmp_path / "run", RUN)
    write_training(out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    curves = panels(drawn[0])
    assert [*curves] == ["loss", "reward accuracy", "reward margin"]
    assert curves["loss"] == {
        "training batches": [[1, 0.69], [2, 0.68], [3, 0.65], [4, 0.64]],
        "held-out pairs": [[0, 0.693], [2, 0.61], [4, 0.62]],
    }
    assert curves["reward margin"]["held-out pairs"] == [[0, 0], [2, 0.312], [4, 0.4]]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "training batches",
        "held-out pairs",
    ]
    assert [*panels(drawn[1])] == ["gradient norm", "learning rate"]
    assert [*panels(drawn[2])] == ["pairs per second"]


def test_the_page_says_what_was_trained_and_how_it_went(tmp_path):
    out = write(tmp_path / "run", RUN)
    write_training(out, command="jaxpref train --loss dpo <&>")
    text = page(out)
    assert "small trained with dpo on pairs.jsonl" in text
    assert (
        "4 steps. Held-out accuracy: 50.0% at step 0, 65.0% at step 4. 12.5 pairs per "
        "second." in text
    )
    assert "0.6100 64.2% 0.312 best 4 0.6200 65.0% 0.4" in text
    assert "jaxpref train --loss dpo &lt;&amp;&gt;" in text
    assert "optimizer.learning_rate 1e-06" in text and "loss.beta 0.1" in text
    assert "keep_best not set" in text
    assert headings(out) == [
        "Training and evaluation",
        "Optimization",
        "Speed",
        "Settings",
    ]
    # One file: figures lie in it, and nothing is fetched.
    html = (out / "report.html").read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_best_evaluation_is_that_of_keep_best(tmp_path):
    out = write(tmp_path, RUN, CONFIG | {"keep_best": "max:eval_rewards/accuracies"})
    write_training(out)
    assert "65.0% 0.4 best" in page(out)


def test_the_learned_flip_rate_has_its_interval(tmp_path, drawn):
    def noise(rate, lower, upper, identified, prefix=""):
        names = ("flip_rate", "flip_rate_lower", "flip_rate_upper", "identified")
        values = (rate, lower, upper, identified)
        return {f"{prefix}noise/{name}": x for name, x in zip(names, values)}

    records = [
        evaluation(0, 0.69, **noise(0.25, 0.05, 0.45, 0.0, "eval_")),
        training(1, 0.69, **noise(0.25, 0.05, 0.45, 0.0), **{"noise/temperature": 1.0}),
        training(2, 0.68, **noise(0.2, 0.1, 0.3, 1.0), **{"noise/temperature": 0.5}),
        evaluation(2, 0.67, **noise(0.2, 0.1, 0.3, 1.0, "eval_")),
    ]
    out = write(tmp_path, records)
    write_training(out)
    flip_rate = panels(drawn[0])["estimated flip rate of the labels"]
    assert flip_rate == {"estimate": [[1, 0.25], [2, 0.2]]}
    (band,) = drawn[0].axes[3].collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == {
        (1, 0.05), (1, 0.45), (2, 0.1), (2, 0.3),
    }  # fmt: skip
    assert band.get_label() == "estimate, 95% interval"
    # In its own section beside the temperature; `identified` is said in words.
    assert [*panels(drawn[1])] == [
        "estimated flip rate of the labels",
        "noise/temperature",
    ]
    text = page(out)
    assert "Estimated flip rate at step 2: 20.0% (95% interval 10.0% to 30.0%)." in text
    assert "0 0.6900 50.0% 0 – 2 0.6700 50.0% 0 20.0% best" in text
    write_training(write(tmp_path, records[:2]))
    assert (
        "At step 1 the pairs do not yet determine the flip rate (95% interval 5.0% to "
        "45.0%)" in page(out)
    )


def test_an_interrupted_run_with_skipped_steps(tmp_path, drawn):
    records = [
        evaluation(0, 0.693),
        training(1, 0.69),
        training(2, None, None, None) | {"grad_norm": None},
        training(3, 0.6) | {"grad_norm": None},
        evaluation(3, None, 0.5, None),
    ]
    out = write(tmp_path, records, end='{"step": 4, "lo')
    write_training(out)
    text = page(out)
    assert "3 of 4 steps so far." in text and "Skipped: 2 steps." in text
    assert "Skipped steps: 2" in text and "2 – – 3 0.6 –" in text
    assert "there may be others" not in text
    # The curve has a gap, and no evaluation of a trained model is the best.
    steps = panels(drawn[0])["loss"]["training batches"]
    assert steps[0] == [1, 0.69] and math.isnan(steps[1][1]) and steps[2] == [3, 0.6]
    assert not re.search(r"\bbest$|best \d", text.partition("Evaluations on")[0])
    write_training(write(tmp_path, records, CONFIG | {"log_every": 10}))
    assert "Only one step in 10 was logged: there may be others." in page(out)


def test_a_resumed_run_counts_a_step_once(tmp_path):
    again = [training(2, 0.6), evaluation(2, 0.5, 0.75), training(3, 0.55)]
    out = write(tmp_path, [*RUN[:5], *again])
    records = read_records(out / "metrics.jsonl")
    of_training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    assert of_training == [(1, 0.69), (2, 0.6), (3, 0.55)]
    assert [r["eval_loss"] for r in records if "eval_loss" in r] == [0.693, 0.5]
    write_training(out)
    assert "3 of 4 steps so far." in page(out)


@pytest.mark.parametrize(
    "records, expected",
    [
        ([], ["Settings"]),
        ([evaluation(0, 0.693)], ["Training and evaluation", "Settings"]),
        (
            [training(1, None)],
            [
                "Training and evaluation",
                "Optimization",
                "Skipped steps: 1",
                "Settings",
            ],
        ),
    ],
    ids=["nothing", "evaluation", "no evaluation"],
)
def test_runs_that_hardly_began(tmp_path, records, expected):
    out = write(tmp_path, records)
    write_training(out)
    assert headings(out) == expected


def test_supervised_fine_tuning_has_no_rejected_side(tmp_path, drawn):
    records = [
        {"step": 0, "eval_loss": 2.5, "eval_logps/chosen": -50.0},
        {"step": 1, "loss": 2.4, "logps/chosen": -48.0, "learning_rate": 1e-6},
        {"step": 1, "eval_loss": 2.3, "eval_logps/chosen": -47.0},
    ]
    out = write(tmp_path, records, CONFIG | {"max_steps": 1})
    write_training(out)
    assert [*panels(drawn[0])] == ["loss"]
    assert panels(drawn[1]) == {
        "log-probabilities (nats)": {
            "chosen, training": [[1, -48.0]],
            "chosen, held out": [[0, -50.0], [1, -47.0]],
        }
    }
    assert "Held-out loss: 2.5000 at step 0, 2.3000 at step 1." in page(out)


def test_a_metric_without_a_panel_gets_one_under_its_name(tmp_path, drawn):
    records = [
        evaluation(0, 0.69, **{"eval_crm/kept": 1.0}),
        training(1, 0.69, **{"crm/kept": 0.9, "crm/agreement": 0.8}),
    ]
    out = write(tmp_path, records)
    write_training(out)
    assert headings(out)[-2:] == ["Other metrics", "Settings"]
    assert panels(drawn[-1]) == {
        "crm/kept": {"training batches": [[1, 0.9]], "held-out pairs": [[0, 1.0]]},
        "crm/agreement": {"training batches": [[1, 0.8]]},
    }


def test_long_curves_are_smoothed_and_short_tables_kept_short(tmp_path, drawn):
    rng = np.random.default_rng(0)
    losses = rng.normal(size=200).tolist()
    records = [training(n + 1, loss) for n, loss in enumerate(losses)]
    records += [evaluation(step, 1 - step / 1000) for step in range(0, 201, 4)]
    out = write(tmp_path, records)
    write_training(out)
    points = np.array(panels(drawn[0])["loss"]["training batches"])
    # Ten places: five on either side, fewer at the ends.
    np.testing.assert_allclose(points[50, 1], np.mean(losses[45:56]))
    np.testing.assert_allclose(points[:2, 1], [losses[0], np.mean(losses[:3])])
    table = (out / "report.html").read_text("utf-8").partition("</table>")[0]
    assert 10 < table.count("<tr>") <= 22 and "200" in table


def test_a_running_mean_keeps_straight_lines_and_gaps():
    line = [3.0 + 2 * n for n in range(9)]
    assert running_mean(line, width=5) == pytest.approx(line)
    gap = [1.0, math.nan, 3.0, 8.0, 1.0]
    found = running_mean(gap, width=3)
    assert math.isnan(found[1])
    assert [found[n] for n in (0, 2, 3, 4)] == pytest.approx([1, 5.5, 4, 1])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metrics.jsonl", None, r"metrics.jsonl: cannot be read \(No such file"),
        ("metrics.jsonl", '{"step": 1}\n7\n{"step": 2}\n', "metrics.jsonl: line 2: "),
        ("metrics.jsonl", "{}\n{}\n", "metrics.jsonl: line 1: not a line of metrics"),
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", "[1]", "config.json: not the config of a run"),
        ("config.json", "{", "config.json: not the config of a run"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, name, content, words):
    out = write(tmp_path, RUN)
    (out / name).unlink()
    if content is not None:
        (out / name).write_text(content, "utf-8")
    with pytest.raises(InputError, match=words):
        write_training(out)
    assert not (out / "report.html").exists()


def test_the_line_of_an_evaluation():
    metrics = evaluation(100, 0.6107, 0.642, 0.312)
    assert (
        evaluation_line(100, metrics)
        == "step 100: eval loss 0.6107, accuracy 64.2%, margin 0.312"
    )
    # Of training without a preference, and of a model that diverged.
    assert evaluation_line(7, {"eval_loss": 123.456}) == "step 7: eval loss 123"
    for value in (None, math.nan, math.inf):
        line = evaluation_line(7, {"eval_loss": value})
        assert line == "step 7: eval loss not finite"
    noise = {
        "eval_noise/flip_rate": 0.147,
        "eval_noise/flip_rate_lower": 0.029,
        "eval_noise/flip_rate_upper": 0.2613,
        "eval_noise/identified": 1.0,
    }
    line = evaluation_line(7, {"eval_loss": 0.5} | noise)
    assert line == "step 7: eval loss 0.5000, flip rate 14.7% (2.9% to 26.1%)"
    line = evaluation_line(7, {"eval_loss": 0.5} | noise | {"eval_noise/identified": 0})
    assert line == "step 7: eval loss 0.5000, flip rate not identified (2.9% to 26.1%)"


def test_the_summary_of_a_run():
    found = summary_lines(RUN, seconds=252, out="runs/a", exports=["runs/a/export"])
    assert found == [
        "4 steps in 4.2 minutes, 12.5 pairs per second",
        "evaluation  step  loss    accuracy  margin",
        "first       0     0.6930  50.0%     0",
        "best        2     0.6100  64.2%     0.312",
        "last        4     0.6200  65.0%     0.4",
        "report: runs/a/report.html, curves: runs/a/curves.png",
        "export: runs/a/export",
    ]
    odds = {"one_rate": 3.0, "annotators": 23.25, "features": -15.0, "both": 11.0}
    noise = {f"noise/log_odds_{name}": value for name, value in odds.items()}
    chosen = [*RUN, training(5, 0.6) | {"noise/model": 2.0} | noise]
    found = summary_lines(chosen, seconds=252, out="a", exports=["b"])
    assert found[-3] == (
        "labels: one flip rate for each annotator (log-odds of 12.2 against "
        '"flip rates that depend on annotator and features")'
    )
    noise["noise/log_odds_features"] = 30.0
    chosen[-1] |= noise | {"noise/model": 1.0}
    found = summary_lines(chosen, seconds=252, out="a", exports=["b"])
    assert found[-3] == (
        'labels: one flip rate for all labels; "flip rates that depend on features of '
        'the pair" explain the labels better (by 27.0 nats), but this may be a '
        "preference of all annotators"
    )
    resumed = summary_lines(RUN, seconds=48, out="b", exports=["c", "d"], start=2)
    assert resumed[0] == "steps 3 to 4 in 48 seconds, 21.2 pairs per second"
    assert resumed[-1] == "export: c, d"
    bare = summary_lines([training(1, 0.7)], seconds=6000, out="b", exports=["c"])
    assert bare[0] == "1 step in 1.7 hours" and len(bare) == 3


@pytest.mark.parametrize(
    "best, step", [("min:eval_loss", 2), ("max:eval_rewards/accuracies", 4)]
)
def test_the_untrained_model_is_never_the_best(best, step):
    records = [evaluation(0, 0.1, 1.0), *RUN[1:], evaluation(6, None, None)]
    found = notable_evaluations(records, best=best)
    assert {name: record["step"] for name, record in found.items()} == {
        "first": 0,
        "best": step,
        "last": 6,
    }
    assert [*notable_evaluations(records[:1], best=best)] == ["first"]
    assert notable_evaluations([training(1, 0.5)], best=best) == {}


def test_durations():
    found = [duration(seconds) for seconds in (0.2, 99, 100, 5999, 6000)]
    assert found == [
        "0 seconds",
        "99 seconds",
        "1.7 minutes",
        "100.0 minutes",
        "1.7 hours",
    ]


def test_what_a_run_prints_needs_no_matplotlib():
    code = (
        "import sys; from jaxpref.report import evaluation_line, summary_lines; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_without_a_number_of_steps_is_reported(tmp_path):
    out = write(tmp_path, RUN, CONFIG | {"max_steps": None})
    write_training(out)
    page = (out / "report.html").read_text("utf-8")
    assert "4 steps." in page and "so far" not in page
