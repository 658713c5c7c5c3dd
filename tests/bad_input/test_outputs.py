"""OUT, full disks and signals: nothing that was written is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref import cli
from jaxpref.train import read_metrics
from tests.bad_input.spoiled import PADDED, the_complaint
from tests.tiny import make_model_folder, make_pairs_file

ROOT = Path(__file__).resolve().parents[2]


def test_out_is_a_file(inputs, refuse):
    inputs.out.write_text("precious")
    refuse(inputs.train(), f"--out {inputs.out}")
    assert inputs.out.read_text() == "precious"


def test_out_cannot_be_written(inputs, refuse):
    if not Path("/proc/self").exists():
        pytest.skip("no folder here that even the administrator cannot write to")
    refuse(inputs.train(out="/proc/run"), "--out /proc/run")


def test_a_wrong_option_does_not_bind_out(inputs, refuse):
    refuse(inputs.train(*PADDED, "--batch-size", 6), "batch_size 6")
    # Not "changed: batch_size".
    refuse(inputs.train(*PADDED, "--batch-size", 7), "batch_size 7")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--batch-size", 16, "--seed", 1], ["batch_size (8 -> 16)", "seed (0 -> 1)"]),
        (["--loss", "ipo"], ["loss", "dpo", "ipo"]),
    ],
)
def test_another_config(finished, refuse, options, fragments):
    before = fingerprint(finished.out)
    refuse(finished.train(*options), str(finished.out), *fragments)
    assert fingerprint(finished.out) == before


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"null and void"])
def test_a_damaged_config_json(resumable, refuse, content):
    (resumable.out / "config.json").write_bytes(content)
    before = fingerprint(resumable.out)
    refuse(resumable.train(), f"{resumable.out}/config.json")
    assert fingerprint(resumable.out) == before


def test_other_data(resumable, refuse):
    make_pairs_file(resumable.data, seed=1)
    before = fingerprint(resumable.out / "checkpoints")
    refuse(resumable.train(), f"the training pairs ({resumable.data} has changed)")
    assert fingerprint(resumable.out / "checkpoints") == before


def test_no_checkpoint_that_can_be_restored(resumable, refuse):
    damaged = [*(resumable.out / "checkpoints").rglob("meta/metadata")]
    assert len(damaged) == 2
    for path in damaged:
        path.write_bytes(b"\0" * 10)
    refuse(resumable.train(), "checkpoints", "[4, 2]", "move the folder away")
    assert (resumable.out / "export" / "model.safetensors").exists()


def test_damaged_reference_log_probs_are_made_anew(resumable, monkeypatch, tmp_path):
    shards = sorted((resumable.out / "reference").rglob("*.safetensors"))
    before = [path.read_bytes() for path in shards]
    assert len(shards) == 2
    shards[0].write_bytes(before[0][:200])
    shards[1].write_bytes(b"PK\x03\x04 torn")
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path))  # nor does any other run know
    monkeypatch.setattr(sys, "argv", ["jaxpref", *resumable.train()])
    cli.main()
    assert [path.read_bytes() for path in shards] == before


def test_a_run_killed_before_its_export_only_exports(resumable, monkeypatch):
    weights = resumable.out / "export" / "model.safetensors"
    before = weights.read_bytes()
    lines = read_metrics(resumable.out / "metrics.jsonl")
    shutil.rmtree(resumable.out / "export")
    (resumable.out / ".export.partial").mkdir()  # what a kill may leave behind
    monkeypatch.setattr(sys, "argv", ["jaxpref", *resumable.train()])
    monkeypatch.setattr("jaxpref.data.feed.Feed.draw", None)  # no step is made
    cli.main()
    assert weights.read_bytes() == before
    assert read_metrics(resumable.out / "metrics.jsonl") == lines
    assert not (resumable.out / ".export.partial").exists()


def test_ten_steps_in_a_row_that_are_not_finite(inputs, refuse):
    argv = inputs.train(max_steps=40, learning_rate=1e38, max_grad_norm=0)
    refuse(argv, "10 bad steps in a row", "step 10", "--learning-rate")
    lines = read_metrics(inputs.out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 10)]
    # None was good, so none was saved.
    assert not list((inputs.out / "checkpoints").iterdir())
    assert (inputs.out / "stopped" / "step_10.json").exists()


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- disk full and signals: in a process of their own -------------------------------

STRUCK = """
import os, resource, signal, sys
# A test run in the background of a shell ignores SIGINT, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
import tests.conftest
from jaxpref import cli
from jaxpref.data.feed import Feed

blow, at_batch = sys.argv[2], int(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
take, taken = Feed.draw, 0

def struck(feed, *state):
    global taken
    taken += 1
    if taken == at_batch and blow == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    elif taken == at_batch:
        os.kill(os.getpid(), signal.Signals[blow])
    return take(feed, *state)

Feed.draw = struck
cli.main()
"""


@pytest.mark.parametrize(
    ("blow", "code", "fragment"),
    [
        ("disk full", 2, "be written"),
        ("SIGINT", 130, "interrupted; the same command resumes"),
    ],
)
def test_a_run_that_is_struck_resumes(
    inputs, finished, monkeypatch, blow, code, fragment
):
    arguments = [str(ROOT), blow, "4", *inputs.train()]
    struck = subprocess.run(
        [sys.executable, "-c", STRUCK, *arguments],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert struck.returncode == code, struck.stderr
    # The threads of tensorstore print tracebacks of their own where a write fails.
    the_complaint(struck.stderr, fragment, tracebacks=blow == "disk full")
    kept = {p.name for p in (inputs.out / "checkpoints").iterdir()} & {"2", "4"}
    assert kept == {"2"} or (blow == "disk full" and not kept)
    assert not (inputs.out / "export").exists()
    monkeypatch.setattr(sys, "argv", ["jaxpref", *inputs.train()])
    cli.main()
    found, expected = (
        [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (inputs.out, finished.out)
    )
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == b["loss"]


def test_no_room_for_a_checkpoint(inputs, refuse, monkeypatch):
    usage = shutil.disk_usage(inputs.folder)
    full = usage._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    refuse(inputs.train(), "checkpoints", "bytes needed, 1,000 free", "to start again")


def test_other_weights_on_resume(inputs, refuse):
    struck = [str(ROOT), "SIGINT", "4", *inputs.train()]
    command = [sys.executable, "-c", STRUCK, *struck]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    make_model_folder(inputs.folder / "model", seed=1)
    changed = f"the weights of the model ({inputs.model} has changed)"
    refuse(inputs.train(), changed, "another --out")
