"""`jaxpref train --loss NAME`: ten steps of each on a real model and real pairs."""

import json
import math
import sys

import pytest

from jaxpref import cli
from jaxpref.cli.objectives import LOSSES
from jaxpref.data import open_source
from jaxpref.train import read_metrics
from tests.answers import write_records

FAST = {"dr_dpo", "rdpo"}
"""Coupled and separable; the rest are slow."""

REQUIRED = {
    "alpha_dpo": {"alpha": 0.5},
    "attribute_regression": {"attributes": "helpfulness,verbosity"},
    "cdpo": {"flip_rate": 0.2},
    "chi_po": {"max_reward": 2.0},
    "flex_dpo": {"chosen_beta": 0.1, "rejected_beta": 0.05},
    "forward_dpo": {"flip_rate": 0.2},
    "gamma_po": {"gamma": 0.5},
    "r_dpo": {"alpha": 0.05},
    "rdpo": {"flip_rate": 0.2},
}
"""Options without a default, for the losses that have some."""

COLUMNS = {
    "davidson": ["tie"],
    "margin_bradley_terry": ["margin"],
    "rao_kupper": ["tie"],
    "reward_regression": ["chosen_rating", "rejected_rating"],
    "scaled_bradley_terry": ["strength"],
}
"""What is read of the records beside the order."""


ANSWERS = {"kto", "bco", "apo_zero_unpaired", "attribute_regression"}
LIVE = {"tdpo1", "tdpo2", "sparse_po", "align_distil"}
"""Losses that read the full distributions of other models."""
LISTS = {"plackett_luce", "lipo_lambda", "irpo"}
"""Losses of other records than pairs."""


def other_records(name, source, path):
    """Labeled answers or lists of two, from dialogues."""
    source = open_source(source)
    records = []
    for n in range(80):
        before, better = source[n]["chosen"].rsplit("Assistant:", 1)
        worse = source[n]["rejected"].rsplit("Assistant:", 1)[1]
        prompt = f"{before}Assistant:"
        if name in LISTS:
            answers = {"completions": [worse, better], "ranks": [2, 1]}
            records.append({"prompt": prompt, **answers})
        else:
            answer = (worse, better)[n % 2]
            records.append({"prompt": prompt, "completion": answer, **about(name, n)})
    return write_records(path, records)


def about(name, n):
    """A label or ratings of the answer."""
    if name == "attribute_regression":
        return {"helpfulness": n % 5, "verbosity": n % 3}
    return {"label": n % 2}


def labeled(source, fields, path):
    """The first records with numbers in these fields."""
    source = open_source(source)
    with path.open("w") as file:
        for n in range(80):
            numbers = {field: n % 3 / 2 for field in fields}
            file.write(json.dumps(source[n] | numbers) + "\n")
    return path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in LOSSES
    ],
)
def test_ten_steps(name, stories260k, shared, tmp_path, monkeypatch, capsys):
    options = {
        "loss": name,
        "model": stories260k,
        "data": shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz",
        "out": tmp_path / "run",
        "max-steps": 10,
        "batch-size": 8,
        "accumulation": 2,
        "max-length": 64,
        "max-pairs": 60,
        "heldout-fraction": 0.2,
        "log-every": 1,
        "learning-rate": 1e-4,
        "mesh.data": 2,
        "mesh.tensor": 2,
    } | {f"loss.{key}": value for key, value in REQUIRED.get(name, {}).items()}
    if name == "align_distil":
        options |= {"teacher": stories260k, "reverse": "start"}
    if name in COLUMNS:
        options["columns"] = ",".join(f"{x}={x}" for x in COLUMNS[name])
        options["data"] = labeled(options["data"], COLUMNS[name], tmp_path / "x.jsonl")
    if name in ANSWERS | LISTS:
        path = tmp_path / "x.jsonl"
        options["data"] = other_records(name, options["data"], path)
    flags = [text for k, v in options.items() for text in (f"--{k}", str(v))]
    monkeypatch.setattr(sys, "argv", ["jaxpref", "train", *flags])
    cli.main()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, 11)]
    assert all(math.isfinite(line["loss"]) for line in steps)
    assert all(math.isfinite(line["grad_norm"]) for line in steps)
    before, after = (line for line in lines if "eval_loss" in line)
    assert before["eval_loss"] != after["eval_loss"]
    assert ("keeps the weights" in capsys.readouterr().out) == (name in LIVE)
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
