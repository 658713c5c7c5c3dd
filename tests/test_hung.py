"""A trainer that hangs under the supervisor is reported and restarted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref.train import read_metrics
from tests.tiny import make_model_folder, make_pairs_file
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]
HUNG = 60.0
"""Seconds; longer than the compilation on two busy cores."""

HANGS = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
once = pathlib.Path(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
from jaxpref import cli
from jaxpref.data.feed import Feed
take, taken = Feed.draw, 0

def hanging(feed, *state):
    global taken
    taken += 1
    if taken == 8 and os.environ["JAX_PROCESS_ID"] == "1" and not once.exists():
        once.touch()
        time.sleep(100_000)  # JAX's heartbeat continues, so JAX does not notice
    return take(feed, *state)

Feed.draw = hanging
cli.main()
"""


@pytest.mark.slow
def test_a_trainer_that_hangs_is_reported_and_restarted(tmp_path):
    make_model_folder(tmp_path / "model")
    make_pairs_file(tmp_path / "pairs.jsonl")
    settings = {
        "model": tmp_path / "model",
        "data": tmp_path / "pairs.jsonl",
        "out": tmp_path / "run",
        "heldout-fraction": 0,
        "max-steps": 12,
        "batch-size": 8,
        "log-every": 1,
        "save-every": 4,
    }
    argv = ["train", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]
    supervisor = [
        "-m",
        "jaxpref.runtime.supervise",
        "--processes",
        "2",
        "--hung",
        str(HUNG),
    ]
    child = [sys.executable, "-c", HANGS, str(ROOT), str(tmp_path / "once"), *argv]
    done = subprocess.run(
        [sys.executable, *supervisor, "--", *child],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": xla_flags(1),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    # A progress bar may precede it on the line.
    (line,) = re.findall("supervise: .*", done.stderr)
    # A step is reported once the next one has been dispatched.
    assert f"process 1 of 2 made no progress for {HUNG:g} s, last: step 6" in line
    assert "process 0: the batch of step 8" in line
    assert line.endswith("; restart 1 of 3 in 1 s")
    steps = [x["step"] for x in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, 13))
