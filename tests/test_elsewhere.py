"""A run that goes on with other devices: the same batches, and a line on the bits."""

import dataclasses
import shutil

import pytest

from jaxpref.runtime.environment import environment_change_message
from jaxpref.train import MeshConfig, read_metrics, run
from tests.test_training import config_for
from tests.tiny import make_model_folder, make_pairs_file

BEGUN, RESUMED = MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)
PACKED = {"row_length": 64, "batch_size": 40}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return (
        make_model_folder(folder / "model"),
        make_pairs_file(folder / "pairs.jsonl"),
    )


def steps_of(out):
    lines = read_metrics(out / "metrics.jsonl")
    return [line for line in lines if "loss" in line]


def test_it_says_what_it_cannot_keep(inputs, tmp_path, capsys):
    """Packed, where the devices decide how many rows a micro-batch has.

    With a pair a row, and with other processes: tests/test_processes.py.
    """
    changes = PACKED | {"max_steps": 4, "eval_every": 9, "mesh": BEGUN}
    whole = config_for(inputs, tmp_path / "whole", **changes)
    run(whole)
    for name in ("here", "there"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "export")
        shutil.rmtree(tmp_path / name / "checkpoints" / "4")
    capsys.readouterr()
    run(dataclasses.replace(whole, out=str(tmp_path / "here")))
    assert "another environment" not in capsys.readouterr().out
    run(dataclasses.replace(whole, out=str(tmp_path / "there"), mesh=RESUMED))
    told = [
        x for x in capsys.readouterr().out.splitlines() if "another environment" in x
    ]
    assert len(told) == 1 and told[0].startswith(
        "resumed at step 2 in another environment (mesh data 1 x fsdp 8 x tensor 1 -> "
        "data 2 x fsdp 2 x tensor 2): the same pairs in the same batches"
    )
    expected, here, there = (
        steps_of(tmp_path / name) for name in ("whole", "here", "there")
    )
    for a, b, c in zip(expected, here, there, strict=True):
        assert a["loss"] == b["loss"]
        assert c["loss"] == pytest.approx(a["loss"], rel=2e-4)
        assert c["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-4)


def test_the_line():
    saved = {"mesh": "data 1", "processes": "2", "jax": "0.10.2"}
    assert environment_change_message(saved, saved | {"cores": "2"}, 7) is None
    line = environment_change_message(
        saved, saved | {"processes": "4", "jax": "0.12"}, 7
    )
    assert (
        "step 7 in another environment (jax 0.10.2 -> 0.12; processes 2 -> 4)" in line
    )
    assert "\n" not in line and "not bit for bit" in line
