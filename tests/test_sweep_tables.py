"""The numbers of a sweep, from records made by hand."""

import csv
import io
import math

import numpy as np
import pytest
import scipy.stats

from jaxpref.sweep.options import SweepOptions
from jaxpref.sweep.output import content_of
from jaxpref.sweep.results import heldout_metrics
from jaxpref.sweep.tables import as_csv, chosen_settings, numeric, settings

OVER = {
    "loss": ("dpo", "rdpo"),
    "loss.beta": ("0.1", "1"),
    "loss.flip-rate": ("0.2",),
    "seed": ("0", "1", "2"),
}


def record(loss, beta, seed, accuracy, kl, **more):
    options = {"loss": loss, "loss.beta": beta}
    if loss == "rdpo":
        options["loss.flip-rate"] = "0.2"
    options["seed"] = seed
    name = ",".join(f"{n}={v}" for n, v in options.items())
    known = {"accuracy": accuracy, "kl": kl, "loss": 0.5, "heldout_log_ratio": -1.0}
    return {
        **{"name": name, "options": options, "objective": loss, "status": "finished"},
        **{"heldout_pairs": 50, "heldout_digest": "a"},
        **known,
        **more,
    }


RECORDS = [
    record("dpo", "0.1", "0", 0.60, 2.0),
    record("dpo", "0.1", "1", 0.70, 1.0),
    record("dpo", "0.1", "2", 0.65, 3.0),
    record("dpo", "1", "0", 0.55, 0.1),
    record("dpo", "1", "1", 0.58, 0.3),
    record("dpo", "1", "2", 0.52, 0.2),
    record("rdpo", "0.1", "0", 0.90, 5.0),
    record("rdpo", "0.1", "1", 0.90, 5.0),
    record("rdpo", "0.1", "2", 0.90, 5.0),
    record("rdpo", "1", "0", 0.61, 0.4),
    record("rdpo", "1", "1", 0.62, 0.5),
    record("rdpo", "1", "2", 0.63, 0.6),
]


def failing(records, *numbers):
    gone = ("accuracy", "kl", "loss", "heldout_log_ratio")
    return [
        {n: v for n, v in r.items() if n not in gone}
        | {"status": "failed", "error": "no, it\nfailed", "exit_code": 65}
        if k in numbers
        else r
        for k, r in enumerate(records)
    ]


def test_numeric_options_are_not_names_or_seeds():
    assert numeric(OVER | {"inject.seed": ("1",)}) == ["loss.beta", "loss.flip-rate"]
    assert numeric({"data": ("a", "1"), "x": ("nan", "1")}) == []


def test_settings_average_over_seeds():
    first, second, third, fourth = settings(failing(RECORDS, 5, 9, 10, 11))
    assert first["options"] == {"loss": "dpo", "loss.beta": "0.1"}
    assert (first["runs"], first["failed"]) == (3, 0)
    values = [0.60, 0.70, 0.65]
    low, high = scipy.stats.t.interval(
        0.95, 2, np.mean(values), scipy.stats.sem(values)
    )
    assert first["accuracy"] == pytest.approx(
        {"mean": 0.65, "deviation": 0.05, "low": low, "high": high}
    )
    assert (second["runs"], second["failed"]) == (2, 1)
    assert second["kl"]["mean"] == pytest.approx(0.2)
    assert third["kl"] == {"mean": 5.0, "deviation": 0.0, "low": 5.0, "high": 5.0}
    assert (fourth["runs"], fourth["failed"]) == (0, 3) and "kl" not in fourth
    assert "margin" not in first and "reward" not in first
    (single,) = settings(RECORDS[:1])
    assert single["accuracy"]["mean"] == 0.6
    assert {single["accuracy"][x] for x in ("deviation", "low", "high")} == {None}


def test_the_tuning_rule_stays_within_its_budget_and_leaves_out_failures():
    chosen = chosen_settings(RECORDS, OVER, "accuracy", most_kl=2.0)
    assert chosen == [
        {
            "method": {"loss": "dpo"},
            "setting": {"loss.beta": "0.1"},
            "kl": pytest.approx(2.0),
            "value": pytest.approx(0.65),
        },
        {
            "method": {"loss": "rdpo"},
            "setting": {"loss.beta": "1", "loss.flip-rate": "0.2"},
            "kl": pytest.approx(0.5),
            "value": pytest.approx(0.62),
        },
    ]
    small, none = chosen_settings(RECORDS, OVER, "accuracy", most_kl=0.25)
    assert small["setting"] == {"loss.beta": "1"}
    assert "No setting has a mean KL of at most 0.25" in none["none"]
    dpo, rdpo = chosen_settings(
        failing(RECORDS, 0, 8, 9), OVER, "accuracy", most_kl=2.0
    )
    assert dpo["setting"] == {"loss.beta": "1"}
    assert rdpo["none"] == "every setting has a run that failed"


def content(records, **options):
    return content_of(records, OVER, SweepOptions(over=("x=1",), **options))


def test_what_is_compared_is_what_is_known():
    """The KL stands on the axis only if every run has one; the reward likewise."""
    frontier = content(RECORDS)["frontier"]
    assert (frontier["x"], frontier["y"]) == ("kl", "accuracy")
    assert frontier["along"] == "loss.beta"
    points = frontier["points"]
    assert {x["arm"] for x in points} == {"dpo", "rdpo, loss.flip-rate=0.2"}
    assert points[3] == {"arm": "dpo", "setting": "1", "kl": 0.1, "accuracy": 0.55}
    rewarded = [r | {"reward": 1.0 * n} for n, r in enumerate(RECORDS)]
    assert content(rewarded)["frontier"]["y"] == "reward"
    assert content([*rewarded[1:], RECORDS[0]])["frontier"]["y"] == "accuracy"
    without = [*RECORDS[1:], RECORDS[0] | {"kl": None}]
    assert content(without)["frontier"]["x"] == "heldout_log_ratio"
    assert content(without, most_kl=1.0)["chosen"] is None
    assert content(failing(RECORDS, *range(12)))["frontier"] is None
    rewards = [{"kl": None, "heldout_log_ratio": None}, {"accuracy": None}]
    for unknown in rewards:
        assert content([r | unknown for r in RECORDS])["frontier"] is None
    assert len(content(failing(RECORDS, 3))["frontier"]["points"]) == 11


def test_pairs_are_counted_only_if_they_are_the_same():
    assert content(RECORDS)["heldout_pairs"] == 50
    others = RECORDS[0] | {"heldout_digest": "b"}
    assert content([others, *RECORDS[1:]])["heldout_pairs"] is None


def test_the_table_has_a_line_for_each_run():
    rows = list(csv.DictReader(io.StringIO(as_csv(failing(RECORDS, 1), OVER))))
    assert len(rows) == 12
    assert [rows[0][n] for n in ("loss.flip-rate", "seed", "kl")] == ["", "0", "2.0"]
    assert rows[1]["error"] == "no, it\nfailed" and rows[1]["kl"] == ""
    assert rows[11]["name"] == "loss=rdpo,loss.beta=1,loss.flip-rate=0.2,seed=2"


def test_metrics_of_an_evaluation():
    def line(step, loss, chosen, rejected):
        found = {"eval_loss": loss, "eval_rewards/accuracies": 0.6}
        more = {"eval_rewards/margins": 0.1, "eval_logps/chosen": chosen}
        return {"step": step, **found, **more, "eval_logps/rejected": rejected}

    lines = [
        line(0, 0.69, -10.0, -12.0),
        {"step": 1, "loss": 0.6},
        line(5, 0.5, -11.0, -15.0),
        line(9, 0.4, -14.0, -20.0),
    ]
    last = heldout_metrics(lines)
    assert last == {
        **{"step": 9, "loss": 0.4, "accuracy": 0.6, "margin": 0.1},
        "heldout_log_ratio": -6.0,
    }
    assert heldout_metrics(lines, step=5)["heldout_log_ratio"] == -2.0
    assert heldout_metrics(lines[2:])["heldout_log_ratio"] is None
    assert heldout_metrics(lines[1:2]) == {}
    assert math.isclose(heldout_metrics(lines[:1])["heldout_log_ratio"], 0)
