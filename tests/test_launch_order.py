"""`launch_tpu.sh` reports success only if it happened: every step needs the one before.

`MUST_PRECEDE` lists every "B must have happened before A" of the script.  Each case
makes B fail, and checks that A does not happen and that the exit code is not 0.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_launch_tpu import SCRIPT, WHERE, Cloud, wait_for

BUCKET = ["--type", "v4-16", "--bucket", "gs://b/x", "--delete-after"]
DISK = ["--type", "v4-8", "--bucket", "none", "--delete-after"]
EXPERIMENT = "echo of $WORKER >runs/result"


class QuickCloud(Cloud):
    """The stub without the supervisor; `variables` are those of the launcher."""

    variables: dict[str, str] = {}

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.started: list[subprocess.Popen] = []

    def environment(self) -> dict[str, str]:
        return super().environment() | {"QUICK": "1"} | self.variables

    def quick(self, *options: str, body=EXPERIMENT, command="run", scenario=""):
        fast = [*WHERE, "--poll-seconds", "0.01"]
        run = [command, *fast, *options, "--", "bash", "-c", body]
        return self.launch(*run, scenario=scenario)


@pytest.fixture
def cloud(tmp_path):
    cloud = QuickCloud(tmp_path)
    yield cloud
    for process in cloud.started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def exists(cloud: Cloud) -> bool:
    return (cloud.folder / "state").read_text() != "ABSENT\n"


@dataclasses.dataclass(frozen=True)
class Case:
    code: int
    says: str
    scenario: str = ""
    options: list[str] = dataclasses.field(default_factory=lambda: BUCKET)
    body: str = EXPERIMENT
    command: str = "run"
    prepare: Callable[[Cloud], object] = lambda cloud: None
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    happened: str = ""
    """A step that did happen."""


def ready(cloud: Cloud) -> None:
    """A TPU with two workers, as if it existed already."""
    (cloud.folder / "state").write_text("ACTIVE\n")
    for worker in ("0-0", "0-1"):
        (cloud.folder / "homes" / worker / "jaxpref").mkdir(parents=True)


def ended(*codes: str) -> Callable[[Cloud], None]:
    """The workers' experiments have ended with these codes."""

    def prepare(cloud):
        ready(cloud)
        for number, code in enumerate(codes):
            (cloud.folder / f"homes/0-{number}/jaxpref/exit").write_text(code)

    return prepare


def one_result(cloud: Cloud) -> None:
    ready(cloud)
    (cloud.folder / "homes/0-0/jaxpref/local").mkdir()
    (cloud.folder / "homes/0-0/jaxpref/runs").symlink_to("local")
    (cloud.folder / "homes/0-0/jaxpref/local/result").write_text("result")


def full_disk(cloud: Cloud) -> None:
    """The folder of the results is a file."""
    (cloud.folder / "results").write_text("")


def without_tar(cloud: Cloud) -> None:
    (cloud.folder / "bin" / "tar").write_text("#!/bin/sh\nexit 3\n")
    (cloud.folder / "bin" / "tar").chmod(0o755)


ONE = {"WORKERS": "1"}
NEVER = "describe 1 HTTP 503\n" * 10
# (what must have happened, what comes after it): the steps that must not be seen
MUST_PRECEDE: dict[tuple[str, str, str], Case] = {
    ("the options are valid", "any call", "describe"): Case(
        2, "--poll-seconds abc", options=[*BUCKET, "--poll-seconds", "abc"]
    ),
    ("it is known that there is no TPU", "create", "create"): Case(
        6, "HTTP 503", scenario=NEVER + "describe 1 HTTP 503\n"
    ),
    ("it is known: not a wrong zone", "create", "create"): Case(
        6,
        "is not found or access is unauthorized",
        scenario="describe 1 PERMISSION_DENIED: Location z is not found or access is"
        " unauthorized\n" * 11,
    ),
    ("the request is accepted", "install", "scp"): Case(
        3, "demo: refused", scenario="create 1 quota\n", happened="create"
    ),
    ("the TPU is active", "install", "scp"): Case(
        4,
        "it stays in the queue",
        scenario="describe 1 NOT_FOUND\ndescribe 0 PROVISIONING\n",
        options=[*BUCKET, "--wait-minutes", "0"],
    ),
    ("the code is packed", "copy it", "scp"): Case(5, "", prepare=without_tar),
    ("the code is copied", "install", "install"): Case(
        5, "ERROR: (gcloud) broken pipe", scenario="scp 1 broken pipe\n"
    ),
    ("all of the code arrived", "start", "start"): Case(
        5, "the code did not arrive completely", scenario="scp 0 damaged\n"
    ),
    ("the bucket is mounted", "start", "start"): Case(
        5, "gcsfuse: no such bucket", scenario="gcsfuse 1 no such bucket\n" * 4
    ),
    ("the packages are installed", "start", "start"): Case(
        5, "pip: no space", scenario="pip-0-1 1 no space\n" * 2
    ),
    ("pip lists the packages", "start", "start"): Case(
        5, "pip lists no packages", scenario="freeze-0-0 0\nfreeze-0-1 0\n" * 2
    ),
    ("every worker reports its packages", "start", "start"): Case(
        5, "only 1 of 2 workers answered", scenario="install 0 damaged\n"
    ),
    ("the workers are counted", "install", "scp"): Case(
        6, "ERROR: (gcloud) denied", scenario="endpoints 1 denied\n" * 2
    ),
    ("the slices are known", "install", "scp"): Case(
        6, "ERROR: (gcloud) denied", scenario="nodes 1 denied\n" * 2
    ),
    ("the versions are stored: the node answered", "start", "start"): Case(
        5, "no answer from the first worker", scenario="pins 0 damaged\n"
    ),
    ("every worker confirms its start", "say so", "follow"): Case(
        6, "only 1 of 2 workers answered", scenario="start 0 damaged\n"
    ),
    ("every worker heard of it", "stop says so", "status"): Case(
        6,
        "only 1 of 2 workers answered",
        scenario="stop 0 damaged\n",
        prepare=ready,
        command="stop",
    ),
    ("all workers have the same packages", "start", "start"): Case(
        5, "different environments", scenario="freeze-0-1 0 jax==0.1\n"
    ),
    ("the versions are stored", "start", "start"): Case(
        5, "ERROR: (gcloud) no answer", scenario="pins 1 no answer\n"
    ),
    ("there is one worker, without a bucket", "start", "start"): Case(
        5, "demo has 2 workers, but --bucket none supports only one", options=DISK
    ),
    ("the secrets are copied", "start", "start"): Case(
        6,
        "ERROR: (gcloud) broken pipe",
        scenario="scp-environment 1 broken pipe\n",
        options=[*BUCKET, "--env", "A=1"],
    ),
    ("all of the secrets arrived", "start the experiment", "follow"): Case(
        6,
        "the values of --env did not arrive completely",
        scenario="scp-environment 0 damaged\n",
        options=[*BUCKET, "--env", "A=1", "--env", "B=2"],
        happened="start",
    ),
    ("it is installed", "start the experiment", "follow"): Case(
        6,
        "code and environment are not installed",
        prepare=ready,
        command="start",
        happened="start",
    ),
    ("every worker has started", "say so", "follow"): Case(
        6, "ERROR: (gcloud) no answer", scenario="start 1 no answer\n"
    ),
    ("every worker that is known answers", "success", "rsync"): Case(
        6, "no response from the workers (10 of 10)", scenario="status 0 damaged\n" * 11
    ),
    ("every worker has succeeded", "success", "rsync"): Case(
        9, "ended with code 9", prepare=ended("0", "9"), command="follow"
    ),
    ("the exit code is known", "success", "rsync"): Case(
        1, "ended with code 1", prepare=ended("0", ""), command="follow"
    ),
    ("the exit code is a number", "success", "rsync"): Case(
        1, "ended with code 1", prepare=ended("0", "0?"), command="follow"
    ),
    ("the experiment has ended", "download", "rsync"): Case(
        3,
        "more than --recreations 0",
        scenario="describe 1 NOT_FOUND\ndescribe 0 ACTIVE\ndescribe 0 SUSPENDED\n",
        options=[*BUCKET, "--recreations", "0"],
    ),
    ("there is a folder for the results", "download", "rsync"): Case(
        7, "were not downloaded completely", prepare=full_disk
    ),
    ("the results are downloaded", "delete", "delete"): Case(
        7,
        "were not downloaded completely",
        scenario="rsync 1 no space left\n",
        happened="rsync",
    ),
    ("the results are downloaded", "fetch says so", "never"): Case(
        7, "no space left", scenario="rsync 1 no space left\n", command="fetch"
    ),
    ("the results are on the disk", "fetch says so", "never"): Case(
        7,
        "the digests of the results could not be read",
        scenario="results 1 no answer\n",
        options=DISK,
        command="fetch",
        prepare=one_result,
    ),
    ("the results are downloaded from the disk", "delete", "delete"): Case(
        7,
        "were not downloaded completely",
        scenario="scp-results 1 no space left\n",
        options=DISK,
        variables=ONE,
    ),
    ("their digests are read", "delete", "delete"): Case(
        7,
        "the digests of the results could not be read",
        scenario="results 255 no answer\n",
        happened="results",
    ),
    ("all of the digests are read", "delete", "delete"): Case(
        7,
        "the digests of the results did not arrive completely",
        scenario="results 0 damaged\n",
    ),
    ("the digests are equal", "delete", "delete"): Case(
        7, "of 2 results are missing or differ", scenario="rsync 0 damaged\n"
    ),
    ("the digests are equal on the disk", "delete", "delete"): Case(
        7,
        "of 2 results are missing or differ in results/demo/local: ./result",
        scenario="scp-results 0 damaged\n",
        options=DISK,
        variables=ONE,
    ),
    ("there is a result", "delete", "delete"): Case(
        7,
        "there are no results; did the experiment write to runs/",
        options=DISK,
        body="echo x >../lost",
        variables=ONE,
    ),
    ("every result can be read", "delete", "delete"): Case(
        7,
        "the digests of the results could not be read",
        options=DISK,
        body="echo x >runs/result; ln -s . runs/loop",
        variables=ONE,
    ),
    ("a lost TPU is deleted", "create it again", "install"): Case(
        3,
        "ERROR: (gcloud) denied",
        scenario="describe 1 NOT_FOUND\ndescribe 0 SUSPENDED\ndelete 1 denied\n",
        happened="delete",
    ),
    ("someone looked at a disk with the only copy", "delete", "delete"): Case(
        3,
        "may hold the only copy of the results",
        scenario="status 255 x\n" * 2 + "node 0 STOPPED\n",
        options=DISK,
        variables=ONE,
        happened="start",
    ),
    ("the TPU is deleted", "say that it costs nothing", "never"): Case(
        3,
        "demo still exists and costs money",
        scenario="delete 1 denied\n",
        happened="delete",
    ),
    ("the TPU is gone", "say that it costs nothing", "never"): Case(
        3, "demo is still ACTIVE after it was deleted", scenario="delete 0 damaged\n"
    ),
    ("a lost TPU is gone", "create it again", "install"): Case(
        3,
        "demo is still SUSPENDED after it was deleted",
        scenario="describe 1 NOT_FOUND\ndescribe 0 SUSPENDED\ndelete 0 damaged\n",
    ),
    ("it is known that there is no TPU", "say so", "never"): Case(
        1,
        "ERROR: (gcloud) credentials not found",
        scenario="describe 1 credentials not found\ndelete 1 credentials not found\n",
        command="delete",
        happened="delete",
    ),
    ("the experiment has ended", "stop says so", "never"): Case(
        6,
        "not stopped after 10 checks",
        prepare=lambda cloud: running(cloud),
        command="stop",
    ),
}


def running(cloud: Cloud) -> None:
    """An experiment that ignores SIGTERM."""
    ready(cloud)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    stubborn = "trap '' TERM; echo; while :; do sleep 1; done"
    for worker in ("0-0", "0-1"):
        process = subprocess.Popen(
            ["bash", "-c", stubborn], start_new_session=True, stdout=subprocess.PIPE
        )
        process.stdout.readline()  # the trap is set
        cloud.started.append(process)
        path = cloud.folder / "homes" / worker / "jaxpref" / "pid"
        path.write_text(f"{process.pid}\n{boot}")


# Those that can lose results; the others take a minute together.
ALWAYS = {
    "the options are valid",
    "there is one worker, without a bucket",
    "the results are downloaded",
    "the digests are equal on the disk",
    "there is a result",
}


def each_case():
    for what in MUST_PRECEDE:
        marks = [] if what[0] in ALWAYS else [pytest.mark.slow]
        yield pytest.param(what, marks=marks, id=" | ".join(what[:2]))


@pytest.mark.parametrize("what", [*each_case()])
def test_what_must_precede(what, cloud):
    case, never = MUST_PRECEDE[what], what[2]
    case.prepare(cloud)
    cloud.variables = case.variables
    code, printed = cloud.quick(
        *case.options, body=case.body, command=case.command, scenario=case.scenario
    )
    assert code == case.code, printed
    assert case.says in printed
    steps = cloud.steps()
    assert never not in steps and (not case.happened or case.happened in steps), steps
    claims = {"results: ", "stopped: ", "nothing to delete", "ended with code 0"}
    if what[1] in ("download", "delete", "say that it costs nothing"):
        claims -= {"ended with code 0"}
    if what[1] == "say that it costs nothing":
        claims -= {"results: "}
    assert not [claim for claim in claims if claim in printed], printed
    if never in ("start", "follow"):
        assert " started\n" not in printed, printed
    if "delete" not in steps and "create" in steps and code != 3:
        assert exists(cloud) and "demo still exists and costs money" in printed


def test_fetch_reports_results_that_it_has_verified(cloud):
    one_result(cloud)
    code, printed = cloud.launch("fetch", *WHERE, "--bucket", "none")
    assert code == 0 and "results: results/demo\n" in printed, printed
    assert "the digests of all 1 results are the same" in printed
    fetched = cloud.folder / "results" / "demo" / "local" / "result"
    assert fetched.read_text() == "result"


@pytest.mark.parametrize(
    "name", ["with a space", "new\nline", "back\\slash", "-rf", "*", "é\x1b[2J", "'\""]
)
def test_any_name_of_a_result_is_compared(name, cloud):
    one_result(cloud)
    result = cloud.folder / "homes/0-0/jaxpref/local" / name
    result.write_text("other")
    code, printed = cloud.launch("fetch", *WHERE, "--bucket", "none")
    assert code == 0 and "the digests of all 2 results are the same" in printed
    (cloud.folder / "results" / "demo" / "local" / name).write_text("damaged")
    # A second copy that does not repair the file.
    (cloud.folder / "bin" / "cp").write_text("#!/bin/sh\n")
    (cloud.folder / "bin" / "cp").chmod(0o755)
    code, printed = cloud.launch("fetch", *WHERE, "--bucket", "none")
    assert code == 7 and "1 of 2 results are missing or differ" in printed
    assert "\x1b" not in printed


SECRET = "hf_s3cret with 'quotes' and\nlines"


def test_values_of_env_stand_in_no_argument_and_no_output(cloud):
    """They reach the experiment through a file with mode 600, which is then deleted."""
    cloud.variables = {"TOKEN": SECRET, "WORKERS": "1"}
    body = 'printf %s "$HF_TOKEN$TOKEN$EMPTY" >runs/seen'
    values = [f"HF_TOKEN={SECRET}", "TOKEN", "EMPTY="]
    options = [*DISK, *(x for value in values for x in ("--env", value))]
    code, printed = cloud.quick(*options, body=body, scenario="delete 1 stay\n")
    assert code == 3, printed
    local = cloud.folder / "homes" / "0-0" / "jaxpref" / "local"
    assert (local / "seen").read_text() == SECRET * 2
    calls = (cloud.folder / "calls").read_text()
    arguments = (cloud.folder / "arguments").read_text()
    assert "# jaxpref: start" in arguments and "jaxpref-environment" in calls
    assert (cloud.folder / "modes").read_text().split() == ["600"]
    for text in (printed, calls, arguments):
        assert "s3cret" not in text
    left = [x for x in cloud.folder.rglob("*") if x.name == "jaxpref-environment"]
    assert not left
    for path in (cloud.folder / "homes").rglob("*"):
        if path.is_file() and path != local / "seen":
            assert b"s3cret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "options",
    [
        ["run", *WHERE, *BUCKET, "--env", "HF_TOKEN=s3cret", "--dry-run"],
        ["run", *WHERE, *BUCKET, "--env", "S3CRET", "--dry-run"],
        ["start", *WHERE, *BUCKET, "--env=A=s3cret", "--dry-run"],
        ["--local", "2", "--env", "HF_TOKEN=s3cret", "--dry-run"],
        ["run", *WHERE, *BUCKET, "--env", "1A=s3cret"],
        ["run", *WHERE, *BUCKET, "--env", "s3cret!"],
        ["run", *WHERE, *BUCKET, "--env", "=s3cret"],
        ["run", *WHERE, *BUCKET, "--env", "A B=s3cret"],
        ["run", *WHERE, *BUCKET, "--git", "https://u:s3cret@h/r", "--commit", "c"],
        ["run", *WHERE, *BUCKET, "--git", "https://s3cret@h/r", "--commit", "c"],
        ["run", *WHERE, *BUCKET, "--git", "ssh://u:s3cret@h/r", "--commit", "c"],
    ],
    ids=range(11),
)
def test_secrets_are_never_printed(options, cloud):
    cloud.variables = {"S3CRET": "s3cret"}
    code, printed = cloud.launch(*options, "--", "true")
    assert "s3cret" not in printed and not cloud.calls()
    if "--dry-run" in options:
        assert code == 0
        name = options[options.index("--dry-run") - 1].removeprefix("--env=")
        assert f"# {name.split('=')[0]}=*** is in a file with mode 600\n" in printed
    else:
        assert code == 2 and printed.count("\n") == 1, printed


def test_local_processes_get_the_values_of_env(tmp_path):
    body = "import os; print(os.environ['A'], os.environ['TOKEN'])"
    done = subprocess.run(
        [SCRIPT, "--local", "1", "--env", "A=b c", "--env", "TOKEN", "--"]
        + ["python", "-c", body],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "TOKEN": "x"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "b c x\n"), done.stderr


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--poll-seconds", "abc"], "--poll-seconds abc: expected a number"),
        (["--poll-seconds", ""], "--poll-seconds : expected a number"),
        (["--poll-seconds", "0"], "--poll-seconds 0: must be more than 0"),
        (["--poll-seconds", "0.00"], "--poll-seconds 0.00: must be more than 0"),
        (["--poll-seconds", "-1"], "--poll-seconds -1: expected a number"),
        (["--poll-seconds", "1e3"], "--poll-seconds 1e3: expected a number"),
        (["--poll-seconds", "5 m"], "--poll-seconds 5 m: expected a number"),
        (["--poll-seconds", "inf"], "--poll-seconds inf: expected a number"),
        (["--node-count", "08"], "--node-count 08: expected a whole number"),
        (["--node-count", "0x8"], "--node-count 0x8: expected a whole number"),
        (["--node-count", "a[$(id>x)]"], "expected a whole number"),
        (["--node-count", "9" * 30], "expected a whole number"),
        (["--node-count", "+2"], "--node-count +2: expected a whole number"),
        (["--wait-minutes", "1.5"], "--wait-minutes 1.5: expected a whole number"),
        (["--wait-minutes", "010"], "--wait-minutes 010: expected a whole number"),
        (["--recreations", "-1"], "--recreations -1: expected a whole number"),
        (["--restarts", " 3"], "--restarts  3: expected a whole number"),
        (["--hung", "1h"], "--hung 1h: expected a number"),
        (["--grace", "nan"], "--grace nan: expected a number"),
        (["--steady", ""], "--steady : expected a number"),
        (["--python", "3"], "--python 3: expected a version"),
        (["--python", "3.12;id"], "--python 3.12;id: expected a version"),
        (["--env", "NOT_SET_AT_ALL"], "--env NOT_SET_AT_ALL: not set in this shell"),
        (["--node-count", "2", "--bucket", "none"], "only the first worker is"),
        (["\x1b[2J\u202e"], "launch_tpu: error: ?[2J?: the experiment comes after --"),
    ],
)
def test_options_are_checked_before_any_call(options, fragment, cloud):
    code, printed = cloud.launch("run", *WHERE, *BUCKET, *options, "--", "true")
    assert code == 2 and fragment in printed and printed.count("\n") == 1, printed
    assert not cloud.calls() and not (cloud.folder / "x").exists()


def test_the_log_of_a_worker_cannot_control_the_terminal(cloud):
    cloud.variables = {"WORKERS": "1"}
    text = r"a\033[2Jb\007\n\302\2332J\342\200\256\342\201\246né\tc"
    code, printed = cloud.quick(*DISK, body=f"printf '{text}'; echo x >runs/x")
    assert code == 0, printed
    assert "a?[2Jb?\n?2J??né\tc" in printed


def test_what_an_interrupted_launcher_says(cloud):
    """Only an experiment that was started keeps running."""
    (cloud.folder / "scenario").write_text("describe 0 after never ACTIVE\n")
    launcher = subprocess.Popen(
        [SCRIPT, "run", *WHERE, *BUCKET, "--", "true"],
        cwd=cloud.folder,
        env=cloud.environment() | {"TMPDIR": str(cloud.folder)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(cloud.folder / "asked")
    os.killpg(launcher.pid, signal.SIGTERM)
    _, printed = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert printed.endswith("interrupted; the same command continues\n"), printed
    assert not [*cloud.folder.glob("tmp.*")]  # its own files are gone
