"""Every command looks at its outputs before it does any work."""

import json
import os
import sys
from pathlib import Path

import pytest

from jaxpref import cli
from jaxpref.evaluate import evaluation
from jaxpref.files import LOCK
from jaxpref.runtime import run_folder
from jaxpref.runtime.run_folder import locked

DATA, MODEL = "--data d.jsonl", "--model m"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Names that look like what they are called; nothing in them is ever read."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "r/export", "a", "s"):
        Path(name).mkdir(parents=True)
    Path("d.jsonl").write_text("precious")
    os.link("d.jsonl", "hard.jsonl")
    Path("l.jsonl").symlink_to("d.jsonl")
    os.mkfifo("fifo")
    Path("m/config.json").write_text('{"model_type": "llama"}')
    Path("r/config.json").write_text('{"loss": {"name": "dpo"}}')
    Path("r/metrics.jsonl").write_text("precious")
    Path("r/export/config.json").write_text('{"model_type": "llama"}')
    Path("a/audit_config.json").write_text("{}")
    Path("a/clean.jsonl").write_text("precious")
    Path("s/state.json").write_text("{}")
    Path("s/dataset_info.json").write_text("{}")
    return tmp_path


REFUSED = [
    (f"sample {MODEL} {DATA} --out d.jsonl", "--out d.jsonl: is part of --data"),
    (f"sample {MODEL} {DATA} --out ./m/../d.jsonl", "is part of --data d.jsonl"),
    (f"sample {MODEL} {DATA} --out hard.jsonl", "is part of --data d.jsonl"),
    (f"sample {MODEL} --data l.jsonl --out d.jsonl", "is part of --data l.jsonl"),
    (f"sample {MODEL} {DATA} --out m/config.json", "is part of --model m"),
    (f"sample {MODEL} {DATA} --out l.jsonl", "is a symbolic link to d.jsonl"),
    (f"sample {MODEL} {DATA} --out /dev/stdout", "is a symbolic link"),
    (f"sample {MODEL} {DATA} --out /dev/null", "is a device"),
    (f"sample {MODEL} {DATA} --out fifo", "a pipe"),
    (f"sample {MODEL} {DATA} --out s", "is a folder"),
    (f"sample {MODEL} {DATA} --out r/metrics.jsonl", "is part of a run in"),
    (f"sample {MODEL} {DATA} --out r/export/x.json", "in the folder of a model"),
    (f"sample {MODEL} {DATA} --out a/clean.jsonl", "is part of an audit in"),
    (f"audit {MODEL} --data a/clean.jsonl --out a", "would overwrite clean.jsonl"),
    (f"audit {MODEL} {DATA} --out m", "--out m: holds a model"),
    (f"audit {MODEL} {DATA} --out r", "--out r: holds a run"),
    (f"audit {MODEL} {DATA} --out r/export", "--out r/export: holds a model"),
    (f"audit {MODEL} {DATA} --out r/checkpoints", "is part of a run in"),
    (f"audit {MODEL} {DATA} --out new --features m", "--features m: holds a model"),
    (f"audit {MODEL} {DATA} --out d.jsonl", "--out d.jsonl: is --data d.jsonl"),
    (f"evaluate {MODEL} {DATA} --out m", "--out m: holds a model"),
    (f"evaluate {MODEL} {DATA} --out r", "--out r: holds a run"),
    (f"evaluate {MODEL} {DATA} --out a", "--out a: holds an audit"),
    (f"evaluate {MODEL} --data s --out s", "--out s: holds a dataset"),
    (f"evaluate {MODEL} {DATA} --out /dev/null/x", "--out /dev/null/x: cannot be"),
    ("merge --models m r/export --out m", "--out m: holds a model"),
    ("merge --models m r/export --out r", "--out r: holds a run"),
    ("merge --models m r/export --out a", "--out a: holds an audit"),
    (f"train {MODEL} {DATA} --out m", "--out m: holds a model"),
    (f"train {MODEL} {DATA} --out a", "--out a: holds an audit"),
    (f"train --model r/export {DATA} --out r", "would overwrite export"),
    (f"train {MODEL} --reference r/export {DATA} --out r", "reads --reference"),
    (f"train {MODEL} --data r/metrics.jsonl --out r", "would overwrite metrics.jsonl"),
    (f"train {MODEL} {DATA} --eval-data r/metrics.jsonl --out r", "reads --eval-data"),
    (f"train {MODEL} {DATA} --out r/export/new", "is part of a run in"),
    (f"train {MODEL} {DATA} --out gs://bucket/run", "mount the bucket"),
]
PLAN = "plan --model llama-3-1b --topology cpu:8 --batch 8 --seq 64 --json"
REFUSED += [
    (f"{PLAN} m/config.json", "--json m/config.json: is in the folder of a model"),
    (f"{PLAN} r/config.json", "--json r/config.json: is part of a run"),
    (f"{PLAN} l.jsonl", "--json l.jsonl: is a symbolic link"),
    (f"{PLAN} /dev/stdout", "--json /dev/stdout: is a symbolic link"),
    (f"{PLAN} s/", "--json s/: is a folder"),
]


def state(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name not in (LOCK, evaluation.LOCK, "new")
    }


@pytest.mark.parametrize(("line", "reason"), REFUSED, ids=[x for x, _ in REFUSED])
def test_an_output_that_would_destroy_something(
    folder, monkeypatch, capsys, line, reason
):
    before = state(folder)
    monkeypatch.setattr(sys, "argv", ["jaxpref", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("jaxpref: error: ")
    assert reason in errors[0]
    assert state(folder) == before


@pytest.mark.parametrize("command", ["train", "audit", "evaluate"])
def test_two_commands_that_write_to_one_folder(folder, monkeypatch, capsys, command):
    argv = ["jaxpref", command, *f"{MODEL} {DATA} --out new".split()]
    Path("new").mkdir()
    monkeypatch.setattr(sys, "argv", argv)
    name = evaluation.LOCK if command == "evaluate" else LOCK
    with locked(Path("new"), name):
        holder = json.loads(Path("new", name).read_text())
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"--out new: process {holder['pid']} on '{holder['host']}'" in error
    assert holder["since"] in error
