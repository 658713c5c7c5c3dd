"""Seconds of a run by phase."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jaxpref.runtime.timings import Timings, process_start, timings


def test_phases_share_the_wall_clock_and_compilation_is_apart(tmp_path):
    passed = Timings(time.time() - 3)
    passed.mark("start")
    time.sleep(0.05)
    passed.count_compilation("/jax/core/compile/backend_compile_duration", 0.03)
    passed.count_compilation("/jax/core/compile/jaxpr_trace_duration", 9.0)
    passed.mark("steps")
    passed.mark("start")
    assert [*passed.seconds] == ["start", "compile", "steps"]
    assert passed.seconds["start"] == pytest.approx(3, abs=0.5)
    assert passed.seconds["compile"] == 0.03
    assert 0.015 < passed.seconds["steps"] < 0.5
    passed.write(tmp_path / "timings.json")
    written = json.loads((tmp_path / "timings.json").read_text())
    assert written == pytest.approx(passed.seconds, abs=1e-3)


def test_compilation_is_heard_of_within():
    with timings() as passed:
        passed.mark("start")
        jax.jit(lambda x: jnp.sin(x) * 17.25)(jnp.ones(3)).block_until_ready()
        passed.mark("steps")
        inside = passed.seconds["compile"]
        assert inside > 0 and passed.seconds["start"] > 0
    jax.jit(lambda x: jnp.sin(x) * 18.25)(jnp.ones(3)).block_until_ready()
    passed.mark("steps")
    assert passed.seconds["compile"] == inside


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_clock_begins_with_the_process():
    code = (
        "import time; time.sleep(0.3); "
        "from jaxpref.runtime.timings import process_start; print(process_start())"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # Whole ticks of a hundredth of a second.
    assert before - 0.1 < float(done.stdout) < before + 0.3
    assert process_start() < before
