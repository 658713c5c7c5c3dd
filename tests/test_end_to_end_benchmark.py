"""The end-to-end benchmark: its arithmetic, its processes, the model it cuts."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.end_to_end import (
    Options,
    cut_layers,
    environment,
    medians,
    ratios,
    read_phases,
    schedule,
    table,
    train_arguments,
)
from benchmarks.peers.cases import write_model
from benchmarks.peers.processes import measured
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from tests.tiny import tiny_config

OPTIONS = Options(model="m", data="/d.jsonl", json="x.json")


def test_the_first_layers_of_a_model_are_those_of_the_model(tmp_path):
    config = tiny_config(num_layers=3)
    write_model(tmp_path / "whole", config)
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    cut = cut_layers(tmp_path / "whole", tmp_path / "cut", 2)
    assert (cut / "tokenizer.json").read_text() == "{}"
    assert read_architecture(cut) == dataclasses.replace(
        read_architecture(tmp_path / "whole"), num_layers=2
    )
    whole, part = (
        load_params(folder, build(read_architecture(folder)))
        for folder in (tmp_path / "whole", cut)
    )
    whole["layers"] = jax.tree.map(lambda x: x[:2], whole["layers"])
    jax.tree.map(np.testing.assert_array_equal, part, whole)
    for layers in (0, 4):
        with pytest.raises(InputError, match=f"--layers {layers}: the model has 3"):
            cut_layers(tmp_path / "whole", tmp_path / "no", layers)


def test_a_command_is_timed_and_its_children_weighed(tmp_path):
    child = "x = bytearray(64 << 20); sum(range(10**7)); import time; time.sleep(0.6)"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); "
        "print('done'); sys.exit(3)"
    )
    with (tmp_path / "log").open("w+") as log:
        took = measured([sys.executable, "-c", parent], {}, log)
        log.seek(0)
        assert log.read() == "done\n"
    assert took.code == 3 and 0.6 < took.seconds < 60
    assert 64 < took.peak_mib < 200 and took.cpu_seconds > 0.1


def test_what_is_typed():
    options = dataclasses.replace(OPTIONS, loss="rdpo", row_length="2048", steps=3)
    typed = train_arguments(options, "m", "o")
    assert typed == (
        "train --model m --data /d.jsonl --out o --loss rdpo --max-steps 3 "
        "--batch-size 8 --max-length 512 --loss.flip-rate 0.2 --row-length 2048"
    ).split(" ")
    assert "--row-length" not in train_arguments(OPTIONS, "m", "o")


def test_a_run_has_caches_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    ours, theirs = (environment(s, tmp_path) for s in ("jaxpref", "trl"))
    for name in ("JAXPREF_CACHE", "HF_HOME"):
        assert ours[name].startswith(f"{tmp_path}/")
    # As for a user who sets none: compiled programs lie in JAXPREF_CACHE.
    assert "JAX_COMPILATION_CACHE_DIR" not in ours
    assert (Path(ours["PYTHONPATH"]) / "jaxpref").is_dir()
    assert "PYTHONPATH" not in theirs


def test_systems_take_turns_and_warm_runs_follow_cold_ones():
    both = {"jaxpref": "", "trl": ""}
    found = schedule(dataclasses.replace(OPTIONS, rounds=2), both)
    one = [(s, c) for c in ("cold", "warm") for s in ("jaxpref", "trl")]
    assert found == [(round_, s, c) for round_ in (0, 1) for s, c in one]
    cold = dataclasses.replace(OPTIONS, rounds=1, caches="cold")
    assert schedule(cold, both) == [(0, "jaxpref", "cold"), (0, "trl", "cold")]
    warm = dataclasses.replace(OPTIONS, rounds=1, caches="warm")
    assert len(schedule(warm, both)) == 4


def test_wrong_options_are_named():
    with pytest.raises(InputError, match="--systems: 'tunix' is not one of"):
        dataclasses.replace(OPTIONS, systems="jaxpref,tunix")
    with pytest.raises(InputError, match="--rounds 0: must be positive"):
        dataclasses.replace(OPTIONS, rounds=0)


def test_medians_phases_and_ratios(tmp_path):
    (tmp_path / "timings.json").write_text(json.dumps({"start": 2.0, "steps": 5.0}))
    phases = read_phases(tmp_path / "timings.json", 10.0)
    assert phases == {"start": 2.0, "steps": 5.0, "other": 3.0}
    assert read_phases(tmp_path / "no.json", 10.0) == {}
    runs = [
        {
            "system": system,
            "caches": "cold",
            "seconds": s,
            "cpu_seconds": 2 * s,
            "peak_mib": m,
            "phases": p,
        }
        for system, s, m, p in [
            ("jaxpref", 10.0, 1024.0, phases),
            ("jaxpref", 30.0, 3072.0, phases | {"steps": 7.0}),
            ("jaxpref", 20.0, 2048.0, phases | {"steps": 9.0}),
            ("trl", 40.0, 1024.0, {}),
        ]
    ]
    ours, theirs = medians(runs)
    assert ours["seconds"] == 20 and ours["range"] == [10, 30] and ours["rounds"] == 3
    assert ours["phases"] == {"start": 2.0, "steps": 7.0, "other": 3.0}
    assert theirs["phases"] == {} and theirs["peak_mib"] == 1024
    assert ratios([ours, theirs]) == [
        {"caches": "cold", "seconds": 0.5, "cpu_seconds": 0.5, "peak_mib": 2}
    ]
    assert ratios([ours]) == []
    computer = {"processor": "P", "cores": 2, "memory_gib": 23.0, "load_average": None}
    text = table(
        {
            "machine": computer,
            "medians": [ours, theirs],
            "ratios": ratios([ours, theirs]),
            "missing": [{"system": "trl", "reason": "why"}],
        }
    )
    assert text.splitlines() == [
        "P, 2 cores, 23.0 GiB, load 0.0 before the runs",
        "system   caches  seconds            range    CPU s  peak GiB",
        "jaxpref  cold       20.0     10.0 to 30.0     40.0      2.00",
        "trl      cold       40.0     40.0 to 40.0     80.0      1.00",
        "jaxpref, cold: start 2.0, steps 7.0, other 3.0",
        "trl, cold: no phases were written",
        "cold caches: 0.50 of TRL's time, 0.50 of its CPU seconds, 2.00 of its memory",
        "missing: trl: why",
    ]


def test_the_help_says_what_is_measured():
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--row-length" in done.stdout and "OUT/timings.json" in done.stdout
