"""The supervisor: failures, restarts, signals, and exit codes."""

import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from jaxpref.runtime import supervise

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--pause", "0.05", "--grace", "5"]

# Each child records its start and knows whether it is the first one.
CHILD = """
import os, signal, sys, time
index = int(os.environ.get("JAX_PROCESS_ID", "0"))
with open(f"started{index}", "a") as file:
    file.write(os.environ.get("JAX_COORDINATOR_ADDRESS", "alone") + "\\n")
first = len(open(f"started{index}").readlines()) == 1
"""


def supervisor(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jaxpref.runtime.supervise", *QUICK, *arguments]


def child(body: str) -> list[str]:
    return ["--", sys.executable, "-c", CHILD + body]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        supervisor(*arguments),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def starts(folder: Path, index: int) -> list[str]:
    return (folder / f"started{index}").read_text().split()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def lines(done: subprocess.CompletedProcess) -> list[str]:
    return [x for x in done.stderr.splitlines() if x.startswith("supervise: ")]


def test_all_processes_are_restarted_after_one_is_killed(tmp_path):
    body = """
if first and index == 1:
    while not os.path.exists("ready"): time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
if first:
    signal.signal(signal.SIGINT, lambda *_: open("stopped", "w") and sys.exit(1))
    open("ready", "w")
    time.sleep(60)
"""
    done = run(tmp_path, "--processes", "2", *child(body))
    assert done.returncode == 0, done.stderr
    assert lines(done) == [
        "supervise: process 1 of 2 ended by SIGKILL; restart 1 of 3 in 0.05 s"
    ]
    addresses = [starts(tmp_path, index) for index in (0, 1)]
    assert addresses[0] == addresses[1] and len(addresses[0]) == 2
    assert all(a.startswith("localhost:") for a in addresses[0])
    assert (tmp_path / "stopped").exists()


def test_a_single_process_gets_no_coordinator(tmp_path):
    done = run(tmp_path, *child("print(index)"))
    assert (done.returncode, done.stdout, lines(done)) == (0, "0\n", [])
    assert starts(tmp_path, 0) == ["alone"]


def test_restarts_run_out_and_the_pause_doubles(tmp_path):
    done = run(tmp_path, "--restarts", "2", *child("sys.exit(7)"))
    assert done.returncode == 7
    assert lines(done) == [
        "supervise: process 0 of 1 ended with code 7; restart 1 of 2 in 0.05 s",
        "supervise: process 0 of 1 ended with code 7; restart 2 of 2 in 0.1 s",
        "supervise: process 0 of 1 ended with code 7; no restarts left of 2",
    ]
    assert len(starts(tmp_path, 0)) == 3


@pytest.mark.parametrize("first", [0.0, 1e-300, 0.05, 1.0, 60.0, 1e300, math.inf])
@pytest.mark.parametrize("restart", [0, 1, 5, 6, 1000, 1023, 1024, 10**6])
def test_the_pause_before_any_restart(restart, first):
    """Exact for fractions, which have no largest power of two."""
    expected = 60.0
    if not math.isinf(first):
        expected = float(min(Fraction(first) * 2 ** min(restart, 2000), Fraction(60)))
    assert supervise._pause_before(restart, first) == expected


def test_the_exit_code_after_a_signal(tmp_path):
    abort = child("os.kill(os.getpid(), signal.SIGABRT)")
    done = run(tmp_path, "--restarts", "0", *abort)
    assert done.returncode == 128 + signal.SIGABRT
    assert "ended by SIGABRT; no restarts left of 0" in done.stderr


@pytest.mark.parametrize("who", [0, 1])
def test_invalid_input_is_not_restarted(tmp_path, who):
    body = f"""
if index == {who}: sys.exit(2)
time.sleep(60)
"""
    done = run(tmp_path, "--processes", "2", *child(body))
    assert done.returncode == 2
    (line,) = lines(done)
    assert f"process {who} of 2 ended with code 2" in line and "not restarted" in line
    assert len(starts(tmp_path, who)) == 1


def test_invalid_input_is_restarted_if_a_peer_was_killed(tmp_path):
    body = """
if first:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(2))
    if index == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    done = run(tmp_path, "--processes", "2", *child(body))
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2 ended by SIGKILL; restart 1" in done.stderr


def test_a_run_that_stopped_itself_is_not_restarted(tmp_path):
    done = run(tmp_path, *child("sys.exit(65)"))
    assert done.returncode == 65
    assert "a run that stopped itself (code 65) is not restarted" in done.stderr
    assert len(starts(tmp_path, 0)) == 1


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit(66)",
        # It made another process die: unlike wrong input, a lack of memory is never
        # what a lost peer causes.
        """
signal.signal(signal.SIGINT, lambda *_: sys.exit(66))
if index == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""",
    ],
)
def test_out_of_memory_is_not_restarted(tmp_path, body):
    done = run(tmp_path, "--processes", "2", *child(body))
    assert done.returncode == 66, done.stderr
    message = "a process that ran out of memory (code 66) is not restarted"
    assert message in done.stderr
    assert len(starts(tmp_path, 0)) == 1


REPORT = """
def report(text, suffix=""):
    with open(os.environ["JAXPREF_PROGRESS"] + suffix, "w") as file: file.write(text)
"""


@pytest.mark.parametrize("how", ["time.sleep(60)", "os.kill(os.getpid(), 19)"])
def test_all_processes_are_restarted_after_one_hangs(tmp_path, how):
    """One sleeps or is stopped at step 3; the other waits for it at step 4."""
    body = f"""{REPORT}
for step in (1, 2, 3):
    report(f"step {{step}}")
    time.sleep(0.1)
if first and index == 1: {how}
report("step 4")
if first: time.sleep(60)
"""
    began = time.monotonic()
    done = run(tmp_path, "--hung", "1.5", "--processes", "2", *child(body))
    assert done.returncode == 0, done.stderr
    (line,) = lines(done)
    assert line.startswith(
        "supervise: process 1 of 2 made no progress for 1.5 s, last: step 3"
    )
    assert line.endswith("; restart 1 of 3 in 0.05 s")
    assert 1.5 < time.monotonic() - began < 30


def test_a_process_that_reports_nothing_or_has_finished_is_not_hung(tmp_path):
    silent = run(tmp_path, "--hung", "0.3", *child("time.sleep(1)"))
    assert (silent.returncode, lines(silent)) == (0, [])
    body = f"""{REPORT}
report("step 1")
os.remove(os.environ["JAXPREF_PROGRESS"])
time.sleep(1)
"""
    finished = run(tmp_path, "--hung", "0.3", *child(body))
    assert (finished.returncode, lines(finished)) == (0, [])
    patient = body.replace("os.remove", "str")
    never = run(tmp_path, "--hung", "0", *child(patient))
    assert (never.returncode, lines(never)) == (0, [])


@pytest.mark.parametrize(
    ("steady", "saved", "restarts"), [("0", True, 3), ("0", False, 1), ("60", True, 1)]
)
def test_a_run_that_makes_progress_does_not_use_up_its_restarts(
    tmp_path, steady, saved, restarts
):
    """It fails three times and would succeed the fourth time."""
    body = f"""{REPORT}
if {saved}: report("100", ".saved")
starts = len(open("started0").readlines())
sys.exit(0 if starts == 4 else 9)
"""
    done = run(tmp_path, "--restarts", "1", "--steady", steady, *child(body))
    assert len(starts(tmp_path, 0)) == 1 + restarts
    expected = ["restart 1 of 1"] * restarts
    if restarts == 1:
        expected.append("no restarts left of 1")
    assert done.returncode == (0 if restarts == 3 else 9)
    assert len(lines(done)) == len(expected)
    assert all(part in line for part, line in zip(expected, lines(done)))


def test_a_process_that_ignores_signals_is_killed(tmp_path):
    body = """
if first and index == 0:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open("deaf", "w")
    time.sleep(60)
if first:
    while not os.path.exists("deaf"): time.sleep(0.02)
    sys.exit(1)
"""
    done = run(tmp_path, "--grace", "0.3", "--processes", "2", *child(body))
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2 ended with code 1" in lines(done)[0]


def test_children_of_a_dead_process_are_killed(tmp_path):
    body = """
import subprocess
if first:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("left", "w").write(str(left.pid))
    sys.exit(1)
try:
    print(open(f"/proc/{open('left').read()}/stat").read().split()[2])
except FileNotFoundError:
    print("gone")
"""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    done = run(tmp_path, *child(body))
    assert done.returncode == 0 and done.stdout.strip() in ("gone", "Z"), done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("ends", "code"),
    # All finished; one or both saved; one did not save.
    [((0, 0), 0), ((143, 143), 143), ((0, 143), 143), ((130, 143), 130)],
)
def test_a_signal_is_forwarded_once(tmp_path, number, ends, code):
    body = f"""
def handler(number, frame):
    open(f"signals{{index}}", "a").write(f"{{number}}\\n")
    sys.exit({ends}[index])
signal.signal(signal.SIGTERM, handler); signal.signal(signal.SIGINT, handler)
open(f"ready{{index}}", "w")
time.sleep(60)
"""
    process = subprocess.Popen(
        supervisor("--processes", "2", *child(body)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for index in (0, 1):
        wait_for(tmp_path / f"ready{index}")
    process.send_signal(number)
    assert process.wait(30) == code, process.stderr.read()
    for index in (0, 1):
        assert (tmp_path / f"signals{index}").read_text() == f"{int(number)}\n"
        assert len(starts(tmp_path, index)) == 1


def test_a_signal_during_the_pause(tmp_path):
    process = subprocess.Popen(
        supervisor("--pause", "60", *child("sys.exit(1)")),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "restart 1 of 3 in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    process.stderr.close()


def test_children_die_with_the_supervisor(tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux signals a child when its parent dies")
    body = 'open("pid", "w").write(f"{os.getpid()} ")\ntime.sleep(60)'
    process = subprocess.Popen(
        supervisor(*child(body)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    wait_for(tmp_path / "pid")
    while not (pid := (tmp_path / "pid").read_text().strip()):
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    stat, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 30
    # It may stay a zombie if no process reaps it.
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "no COMMAND"),
        (["--"], "no COMMAND"),
        (["--processes", "0", "--", "true"], "must be at least 1"),
        (["--restarts", "-1", "--", "true"], "must be at least 0"),
        (["--grace", "nan", "--", "true"], "must be at least 0"),
        (["--hung", "-1", "--", "true"], "must be at least 0"),
        (["--restart", "many", "--", "true"], "many"),
        (["--", "/no/such/command"], "/no/such/command: No such file"),
    ],
)
def test_invalid_usage(tmp_path, arguments, fragment):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert fragment in done.stderr and "Traceback" not in done.stderr


def test_the_supervisor_does_not_import_jax():
    code = "import sys, jaxpref.runtime.supervise; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n"
